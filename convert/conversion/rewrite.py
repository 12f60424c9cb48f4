"""Convolutions become adder layers in place, and back; and the record that replays a conversion on a fresh model.

A conversion changes the *class* of the module object, from ``Conv2d`` to a subclass of ``AdderConv2d``. So parameters,
device, dtype, mode, hooks, sharing and every reference to the module survive by construction. Two things may be added:
a transformed weight is folded into the parameter (``handlers``), and a BatchNorm is inserted (``layers``).
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import AdderConv2dSame, NormalizedAdderConv2d, adder_layers
from ..errors import CheckpointError, NoModuleMatchedError
from ..patterns import matching
from ..pruning.surgery import PRUNE, replay_shapes_
from ..quantization.fake_quantize import STEP as FAKE
from ..quantization.fake_quantize import replay_fake_
from .config import AdderConfig
from .converters import ConvConverter, adder_class, converter_of, fold_weight_, plain_class
from .plan import ConversionPlan, plan

STEP_VERSION = 1
ADDER, PLAIN = "adder", "plain"
_LISTS = ("modules", "normalized", "folded")


@dataclasses.dataclass(frozen=True)
class _Swap:
    """A change of one module: to an adder layer, or to the plain convolution that a folded layer is."""

    path: str
    step: str
    normalized: bool = False


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
        inserted = {row.path for row in todo.rows if row.inserted}
        folded = _carry_out(model, [_Swap(path, ADDER, path in inserted) for path in paths])
        step = _step(ADDER, paths, normalized=[path for path in paths if path in inserted], folded=folded)
        _set_steps(model, [*steps_of(model), {**step, "config": todo.config.to_dict()}])
    return todo


def revert_(model: nn.Module, include: Sequence[str] = ("*",)) -> int:
    """Turn adder layers back into convolutions, in place, with the weights they have now.

    An inserted normalization goes; a layer whose weight was folded becomes a plain convolution with that weight, which
    is recorded.

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
        if isinstance(layer, NormalizedAdderConv2d):
            layer.remove_normalization_()
        plain: Any = plain_class(isinstance(layer, AdderConv2dSame))
        layer.__class__ = plain
    folded = forget_(model, {path for path, layer in adders.items() if id(layer) in chosen})
    if folded:
        _set_steps(model, [*steps_of(model), _step(PLAIN, folded)])
    return len(chosen)


def forget_(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Take modules out of the record of conversions, as if they had never been converted; those that were folded."""
    steps, folded = [], []
    for step in steps_of(model):
        if step["step"] == ADDER:
            folded += [path for path in step.get("folded", ()) if path in paths]
            lists = {key: [path for path in step[key] if path not in paths] for key in _LISTS if key in step}
            step = {key: lists.get(key, value) for key, value in step.items() if lists.get(key, True)}
        if step["step"] not in (ADDER, PLAIN) or step.get("modules"):
            steps.append(step)
    _set_steps(model, steps)
    return folded


def is_converted(model: nn.Module) -> bool:
    """Whether the model holds an adder layer."""
    return bool(adder_layers(model))


def steps_of(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to the model, in order; ``replay_`` does it again to a fresh one. JSON-ready."""
    return copy.deepcopy(getattr(model, "_adderkit_steps", []))


def add_step_(model: nn.Module, step: Mapping[str, Any]) -> None:
    """Note one more step that was carried out."""
    _set_steps(model, [*steps_of(model), dict(step)])


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
    swaps = [_checked_swaps(step) for step in steps]
    if any(step["step"] == FAKE for step in steps[:-1]):
        raise CheckpointError(f"a {FAKE!r} step is not the last in the checkpoint; nothing can follow it")
    try:
        folded = _check(model, [swap for part in swaps for swap in part])
    except NoModuleMatchedError as error:
        raise CheckpointError(f"the checkpoint's steps do not fit its base model: {error}") from error
    for step, part in zip(steps, swaps, strict=True):
        found = [swap.path for swap in part if swap.step == ADDER and swap in folded]
        if step["step"] == ADDER and step.get("folded", []) != found:
            raise CheckpointError(
                f"folded is {step.get('folded', [])!r:.80} in an 'adder' step, "
                f"expected {found!r:.80} for this base model"
            )
    for step, part in zip(steps, swaps, strict=True):
        if step["step"] == PRUNE:
            replay_shapes_(model, step)
        elif step["step"] == FAKE:
            replay_fake_(model, step)
        else:
            _carry_out(model, part)
    _set_steps(model, [dict(step) for step in steps])


def _step(kind: str, modules: list[str], **lists: list[str]) -> dict[str, Any]:
    """A record; lists that are empty are left out."""
    filled = {key: value for key, value in lists.items() if value}
    return {"step": kind, "version": STEP_VERSION, "modules": modules, **filled}


def _checked_swaps(step: Mapping[str, Any]) -> list[_Swap]:
    """The changes of class that a recorded step made."""
    if not isinstance(step, Mapping) or step.get("step") not in (ADDER, PLAIN, PRUNE, FAKE):
        raise CheckpointError(
            f"unknown step {step!r:.80} in the checkpoint, expected 'adder', 'plain', 'prune', 'fake_quantize' or, as "
            "the last, 'quantize': install a newer adderkit"
        )
    if step["step"] in (PRUNE, FAKE):
        return []
    if step.get("version") != STEP_VERSION:
        raise CheckpointError(
            f"the {step['step']!r} step has version {step.get('version')!r}, expected {STEP_VERSION}: "
            "install a newer adderkit"
        )
    for key in _LISTS:
        paths = step.get(key, [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise CheckpointError(f"{key} is {paths!r:.80} in a {step['step']!r} step, expected a list of module paths")
    modules, normalized = step.get("modules"), step.get("normalized", [])
    if not modules:
        raise CheckpointError(f"modules is {modules!r} in a {step['step']!r} step, expected a list of module paths")
    if not set(normalized) <= set(modules):
        raise CheckpointError(f"normalized is {normalized!r:.80} in an 'adder' step, expected some of its modules")
    return [_Swap(path, step["step"], path in normalized) for path in modules]


def _check(model: nn.Module, swaps: Sequence[_Swap]) -> set[_Swap]:
    """Refuse changes that do not fit the model before the first is made; return those that bake a weight."""
    modules = dict(model.named_modules(remove_duplicate=False))
    changed: dict[int, str] = {}
    folded = set()
    for swap in swaps:
        module = modules.get(swap.path)
        before = changed.get(id(module))
        if before == swap.step or (before == ADDER and swap.step == PLAIN):
            raise CheckpointError(f"{swap.path!r} is converted twice in the checkpoint's steps")
        handler = None if module is None else converter_of(type(module))
        if handler is None or (swap.step == PLAIN and not handler.folds_weight):
            found = "does not exist" if module is None else f"is a {type(module).__name__}"
            raise NoModuleMatchedError(
                f"{swap.path!r} {found}, expected a convolution that can be converted: this plan is not for this model"
            )
        if handler.folds_weight and before is None:
            folded.add(swap)
        changed[id(module)] = swap.step
    return folded


def _carry_out(model: nn.Module, swaps: Sequence[_Swap]) -> list[str]:
    """Make the changes, all of which are checked first; the paths whose weights were folded."""
    folded = _check(model, swaps)
    modules = dict(model.named_modules(remove_duplicate=False))
    for swap in swaps:
        layer = modules[swap.path]
        handler = converter_of(type(layer))
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(handler, ConvConverter)
        same = handler.same(layer)
        fold_weight_(layer, handler)
        layer.__class__ = plain_class(same) if swap.step == PLAIN else adder_class(same, swap.normalized)
        if isinstance(layer, NormalizedAdderConv2d):
            layer.insert_normalization_()
    return [swap.path for swap in swaps if swap in folded]


def _set_steps(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    model._adderkit_steps = steps  # type: ignore[assignment]
