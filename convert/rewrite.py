"""Convolutions become adder layers in place, and back; and the record that replays a conversion on a fresh model.

A conversion changes the *class* of the module object, from ``Conv2d`` to its subclass ``AdderConv2d``, and nothing
else. So parameters, device, dtype, mode, hooks, sharing and every reference to the module survive by construction.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adder_layers.conv import AdderConv2d
from .config import AdderConfig, matching
from .errors import CheckpointError, NoModuleMatchedError
from .plan import ConversionPlan, plan

STEP_VERSION = 1


def convert_(
    model: nn.Module,
    plan_or_config: ConversionPlan | AdderConfig = AdderConfig(),  # noqa: B008 - frozen, hence safe as a default
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_input: Tensor | None = None,
) -> ConversionPlan:
    """Turn convolutions into adder layers, in place. Converting again what is converted changes nothing.

    Weights are kept as they are; ``calibrate_`` fits them to their new meaning.

    Args:
        model: The model to change.
        plan_or_config: A plan that ``plan`` made for this model, or the configuration to make one with.
        filter_fn: See ``plan``; only with a configuration.
        example_input: See ``plan``; only with a configuration.

    Returns:
        The plan that was carried out.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input, or the plan is not for this model.
    """
    todo = plan_or_config
    if isinstance(todo, AdderConfig):
        todo = plan(model, todo, filter_fn, example_input)
    elif filter_fn is not None or example_input is not None:
        raise ValueError("filter_fn and example_input go with a configuration; a plan is made already")
    converted = adder_layers(model)
    paths = [path for path in todo.paths("convert") if path not in converted]
    if paths:
        _swap(model, paths)
        step = {"step": "adder", "version": STEP_VERSION, "modules": paths, "config": todo.config.to_dict()}
        _set_steps(model, [*steps_of(model), step])
    return todo


def revert_(model: nn.Module, include: Sequence[str] = ("*",)) -> int:
    """Turn adder layers back into convolutions, in place, with the weights they have now.

    Args:
        model: The model to change.
        include: Patterns as in ``AdderConfig``.

    Returns:
        The number of layers turned back.

    Raises:
        NoModuleMatchedError: No adder layer matches.
    """
    adders = {
        path: layer for path, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, AdderConv2d)
    }
    chosen = {id(layer): layer for path, layer in adders.items() if matching(include, path)}
    if not chosen:
        raise NoModuleMatchedError(
            f"{', '.join(map(repr, include))} matches none of {len(adders)} adder layers"
            + (f"; the first is {next(iter(adders))!r}" if adders else ": the model is not converted")
        )
    for layer in chosen.values():
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    aliases = {path for path, layer in adders.items() if id(layer) in chosen}
    steps = []
    for step in steps_of(model):
        kept = [path for path in step["modules"] if path not in aliases] if step["step"] == "adder" else None
        if kept is None:
            steps.append(step)
        elif kept:
            steps.append({**step, "modules": kept})
    _set_steps(model, steps)
    return len(chosen)


def is_converted(model: nn.Module) -> bool:
    """Whether the model holds an adder layer."""
    return bool(adder_layers(model))


def adder_layers(model: nn.Module) -> dict[str, AdderConv2d]:
    """Adder layers by path, in order of registration; a shared one once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdderConv2d)}


def steps_of(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to the model, in order; ``replay_`` does it again to a fresh one. JSON-ready."""
    return copy.deepcopy(getattr(model, "_adderkit_steps", []))


def replay_(model: nn.Module, steps: Iterable[Mapping[str, Any]]) -> None:
    """Carry out recorded steps on a freshly built base model.

    Args:
        model: The base model.
        steps: As ``steps_of`` gave them; read from a checkpoint, hence checked.

    Raises:
        CheckpointError: A step is malformed, unknown, or does not fit the model.
    """
    if not isinstance(steps, Iterable):
        raise CheckpointError(f"steps is {steps!r:.80} in the checkpoint, expected a list")
    steps = list(steps)
    paths = [path for step in steps for path in _checked_paths(step)]
    twice = next((path for index, path in enumerate(paths) if path in paths[:index]), None)
    if twice is not None:
        raise CheckpointError(f"{twice!r} is converted twice in the checkpoint's steps")
    try:
        _swap(model, paths)
    except NoModuleMatchedError as error:
        raise CheckpointError(f"the checkpoint's steps do not fit its base model: {error}") from error
    _set_steps(model, [dict(step) for step in steps])


def _checked_paths(step: Mapping[str, Any]) -> list[str]:
    """The modules that a recorded step converted."""
    if not isinstance(step, Mapping) or step.get("step") != "adder":
        raise CheckpointError(
            f"unknown step {step!r:.80} in the checkpoint, expected 'adder': install a newer adderkit"
        )
    if step.get("version") != STEP_VERSION:
        raise CheckpointError(
            f"the 'adder' step has version {step.get('version')!r}, expected {STEP_VERSION}: install a newer adderkit"
        )
    paths = step.get("modules")
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise CheckpointError(f"modules is {paths!r:.80} in an 'adder' step, expected a list of module paths")
    return paths


def _swap(model: nn.Module, paths: Sequence[str]) -> None:
    """Change the classes; all paths are checked before the first is touched."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if type(modules.get(path)) is not nn.Conv2d:
            found = f"is a {type(modules[path]).__name__}" if path in modules else "does not exist"
            raise NoModuleMatchedError(f"{path!r} {found}, expected a Conv2d: this plan is not for this model")
    for path in paths:
        modules[path].__class__ = AdderConv2d


def _set_steps(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    model._adderkit_steps = steps  # type: ignore[assignment]
