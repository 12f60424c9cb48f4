"""Options for the settings of a recipe: each key of ``Recipe`` is an option too, as in timm's ``train.py``."""

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from ..configs.recipe import Recipe

_NO_OPTIONS = ("version", "description")
# Other names that timm has for options; and those of amp, which has a value here and two options there.
_ALIASES = {"auto_augment": ("--aa",)}
_AMP, _AMP_DTYPE = "amp", "amp_dtype"
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16"}

_Amp = Annotated[bool | None, typer.Option("--amp/--no-amp", hidden=True)]
_AmpDtype = Annotated[Literal["float16", "bfloat16"] | None, typer.Option("--amp-dtype", hidden=True)]


def with_recipe_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb an option for each key of a recipe that is not one of its parameters.

    The options are not listed one by one in the help, which names them in one paragraph.

    Args:
        verb: Function of the verb; it receives the given settings, by key, as the argument ``settings``.
    """
    signature = inspect.signature(verb)
    hints = get_type_hints(Recipe)
    options = {
        field.name: _option(field.name, hints[field.name])
        for field in dataclasses.fields(Recipe)
        if field.name not in (*_NO_OPTIONS, _AMP, *signature.parameters)
    }
    options |= {_AMP: _Amp, _AMP_DTYPE: _AmpDtype}
    own = [each for each in signature.parameters.values() if each.name != "settings"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]

    @functools.wraps(verb)
    def run(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in options}
        verb(**arguments, settings=_settings({name: value for name, value in given.items() if value is not None}))

    wrapped: Any = run
    wrapped.__signature__ = signature.replace(parameters=[*own, *added])
    wrapped.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
    names = textwrap.fill(" ".join(map(_flag, options)), 76, break_on_hyphens=False)
    wrapped.__doc__ = (
        f"{inspect.getdoc(verb)}\n\nFurther options change any other setting, named as in timm's train.py:\n\n"
        f"\b\n{names}"
    )
    return run


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option(name: str, kind: Any) -> Any:
    """Return the annotation of a parameter that stands for a key of the recipe."""
    flag = _flag(name)
    if kind is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag.removeprefix('--')}", hidden=True)]
    known: Any = next((each for each in (int, float) if kind in (each, each | None)), str)
    if get_origin(kind) is Literal:
        known = int if all(type(value) is int for value in kind.__args__) else str
    return Annotated[known | None, typer.Option(flag, *_ALIASES.get(name, ()), hidden=True)]


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, with one value for ``--amp`` and ``--amp-dtype``; as in timm, it is fp16 by default."""
    dtype = given.pop(_AMP_DTYPE, None)
    if given.get(_AMP) is False:
        return {**given, _AMP: "no"}
    if dtype is not None or given.get(_AMP):
        return {**given, _AMP: _PRECISIONS[dtype or "float16"]}
    return given
