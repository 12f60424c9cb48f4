"""Which convolutions a conversion takes: a frozen configuration and its pattern language."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args

from .errors import AdderkitError

CONFIG_VERSION = 1
Norm = Literal["insert", "skip", "error"]


@dataclasses.dataclass(frozen=True)
class AdderConfig:
    """What to convert. The default is the policy of the AdderNet papers: all but the first and the last layer.

    A pattern is a module path (``layer1.0.conv1``), a glob (``layer4.*``; ``*`` crosses dots) or ``re:`` and a regular
    expression that must match the whole path. ``exclude`` wins over ``include``.

    Args:
        include: Patterns of modules that may be converted.
        exclude: Patterns of modules that stay as they are.
        skip_first: Keep the first convolution; replacing it costs accuracy and saves little (AdderNet issue 60).
        skip_last: Keep the classifier where it is a convolution.
        skip_depthwise: Keep depthwise convolutions: they hold few of the multiplications and lose most (MobileNetV2).
        skip_gates: Keep convolutions on 1x1 maps that no normalisation follows, as in squeeze-and-excite gates.
        norm: What to do with a convolution that no normalisation follows: ``insert`` a BatchNorm2d, ``skip`` it, or
            ``error``. Before a GroupNorm or LayerNorm, which normalises channels together, ``insert`` inserts one too.
        version: Version of this form.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    skip_first: bool = True
    skip_last: bool = True
    skip_depthwise: bool = False
    skip_gates: bool = True
    norm: Norm = "insert"
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise AdderkitError(f"{name} is {patterns!r}, expected a tuple of patterns such as ('layer4.*',)")
            object.__setattr__(self, name, tuple(patterns))
        if self.norm not in get_args(Norm):
            raise AdderkitError(f"norm is {self.norm!r}, expected one of {', '.join(get_args(Norm))}")
        for pattern in (*self.include, *self.exclude):
            compile_pattern(pattern)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping that ``from_dict`` reads back."""
        return {**dataclasses.asdict(self), "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "AdderConfig":
        """Read what ``to_dict`` wrote.

        Raises:
            AdderkitError: An unknown key, a wrong type or a version this release does not know.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "adder configuration")
        values = dict(mapping)
        for name in ("include", "exclude"):
            patterns = values.get(name, [])
            if not isinstance(patterns, list | tuple) or not all(isinstance(item, str) for item in patterns):
                raise AdderkitError(f"{name} is {patterns!r} in the adder configuration, expected a list of patterns")
            if name in values:
                values[name] = tuple(patterns)
        for name in ("skip_first", "skip_last", "skip_depthwise", "skip_gates"):
            if not isinstance(values.get(name, True), bool):
                raise AdderkitError(f"{name} is {values[name]!r} in the adder configuration, expected true or false")
        return cls(**values)


def check_keys(form: type, mapping: Mapping[str, Any], version: int, what: str) -> None:
    """Refuse a mapping of another version, or with keys that the form has not.

    Args:
        form: The dataclass that is read.
        mapping: What somebody wrote.
        version: The one that this release knows, taken where the mapping names none.
        what: The form's name for the error.

    Raises:
        AdderkitError: As above.
    """
    found = mapping.get("version", version)
    if found != version:
        raise AdderkitError(f"{what} has version {found!r:.80}, expected {version}: install a newer adderkit")
    known = [field.name for field in dataclasses.fields(form)]
    for key in mapping:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AdderkitError(f"unknown key {key!r:.80} in the {what}{hint}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression behind a path, a glob or ``re:…``.

    Raises:
        AdderkitError: The pattern is empty or its regular expression is malformed.
    """
    if not pattern:
        raise AdderkitError("a module pattern is empty; expected a path, a glob such as 'layer4.*' or 're:<regex>'")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise AdderkitError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first of the patterns that matches the whole of ``name``."""
    return next((pattern for pattern in patterns if compile_pattern(pattern).fullmatch(name)), None)


def nearest_names(pattern: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Module names that a mistyped pattern may have meant, best first."""
    return get_close_matches(pattern.removeprefix("re:"), list(names), n=limit, cutoff=0.3)
