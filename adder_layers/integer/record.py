"""Convert a plan to JSON without its tensors, and back to a plan filled with zeros, ready for its weights to be loaded.

The shapes of all tensors follow from the structure. A structure may come from an untrusted file: each number is checked
before anything is allocated, and ``check_plan`` runs once the tensors are loaded.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..geometry import Window
from .plan import (
    Activation,
    Adder,
    AveragePool,
    Convolution,
    Filters,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
    step_tensors,
)

_MOST = 1 << 24  # channels, pixels along a side and the like: far more than any image has
_MOST_TERMS = 24  # the sum of one more would not fit into int32
_WINDOW = ("kernel", "stride", "padding", "dilation")
_CLASSES: dict[str, type[Step]] = {cls.kind: cls for cls in get_args(Step)}


def structure_of(plan: IntegerPlan) -> dict[str, Any]:
    """Return everything in a plan except its tensors, JSON-ready."""
    return {
        "activations": [[each.channels, each.height, each.width, each.scale] for each in plan.activations],
        "steps": [_step_structure(step, path) for step, path in zip(plan.steps, plan.paths, strict=True)],
    }


def _step_structure(step: Step, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": step.kind, "path": path, "input": step.input}
    match step:
        case Adder() | Convolution():
            found |= {"output": step.output, **_window_structure(step.window), "groups": step.groups}
            found |= {"terms": step.terms} if step.terms > 1 else {}
            found |= _requantization_structure(step.requantization)
        case AveragePool():
            found |= {"output": step.output, **_window_structure(step.window)}
            found |= _requantization_structure(step.requantization)
        case Rescale():
            found |= {"output": step.output, **_requantization_structure(step.requantization)}
        case MaxPool():
            found |= {"output": step.output, **_window_structure(step.window)}
        case Linear():
            found |= {"outputs": len(step.offset), "scale": step.scale}
        case _:
            assert_never(step)
    return found


def _window_structure(window: Window) -> dict[str, list[int]]:
    return {name: list(value) for name, value in zip(_WINDOW, window, strict=True)}


def _requantization_structure(factors: Requantization) -> dict[str, int]:
    residual = {} if factors.residual is None else {"residual": factors.residual}
    return {"quant_max": factors.quant_max, **residual}


def empty_plan(structure: Any) -> IntegerPlan:
    """Return a plan of a recorded structure whose tensors are zeros.

    Raises:
        ValueError: The structure is not one that ``structure_of`` returns; the message says where.
    """
    activations, steps = (_list(structure, name) for name in ("activations", "steps"))
    made = tuple(_activation(value, f"activation {number}") for number, value in enumerate(activations))
    found, paths = [], []
    for number, value in enumerate(steps):
        name = f"step {number}"
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r:.80}, expected an object")
        found.append(_step(value, made, name))
        path = value.get("path")
        if not isinstance(path, str):
            raise ValueError(f"path of {name} is {path!r:.80}, expected text")
        paths.append(path)
    return IntegerPlan(made, tuple(found), tuple(paths))


def tensors_of(plan: IntegerPlan) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a plan by name, such as ``steps.3.weight``."""
    for number, activation in enumerate(plan.activations):
        yield f"activations.{number}.zero_point", activation.zero_point
    for number, step in enumerate(plan.steps):
        for name, tensor in step_tensors(step).items():
            yield f"steps.{number}.{name}", tensor


def with_tensors(plan: IntegerPlan, tensors: Mapping[str, Tensor]) -> IntegerPlan:
    """Return the same plan with other tensors, given by the names that ``tensors_of`` uses."""
    activations = [
        replace(each, zero_point=tensors[f"activations.{number}.zero_point"])
        for number, each in enumerate(plan.activations)
    ]
    return replace(
        plan,
        activations=tuple(activations),
        steps=tuple(_with_tensors(step, f"steps.{number}.", tensors) for number, step in enumerate(plan.steps)),
    )


def _with_tensors(step: Step, prefix: str, tensors: Mapping[str, Tensor]) -> Step:
    own: dict[str, Any] = {name: tensors[prefix + name] for name in step_tensors(step)}
    match step:
        case Adder() | Convolution():
            weight = own.pop("weight")
            return replace(step, weight=weight, requantization=replace(step.requantization, **own))
        case Rescale() | AveragePool():
            return replace(step, requantization=replace(step.requantization, **own))
        case Linear():
            return replace(step, **own)
        case MaxPool():
            return step
        case _:
            assert_never(step)


def _list(structure: Any, name: str) -> list[Any]:
    value = structure.get(name) if isinstance(structure, Mapping) else None
    if not isinstance(value, list) or not value or len(value) > _MOST:
        raise ValueError(f"{name} is {value!r:.80} in the plan, expected a list")
    return value


def _whole(value: Any, name: str, least: int = 0, most: int = _MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.80}, expected a whole number from {least} to {most}")
    return value


def _scale(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"scale of {name} is {value!r:.80}, expected a positive number")
    return float(value)


def _activation(value: Any, name: str) -> Activation:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"{name} is {value!r:.80}, expected channels, height, width and scale")
    channels, height, width = (_whole(each, f"a size of {name}", 1) for each in value[:3])
    return Activation(channels, height, width, _scale(value[3], name), torch.zeros(channels, dtype=torch.uint8))


def _step(value: Mapping[str, Any], activations: tuple[Activation, ...], name: str) -> Step:
    kind, last = value.get("kind"), len(activations) - 1
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"kind of {name} is {kind!r:.80}, which this version does not know: install a newer adderkit")
    source = _whole(value.get("input"), f"input of {name}", 0, last)
    if cls is Linear:
        return _linear(value, source, activations[source], name)
    target = _whole(value.get("output"), f"output of {name}", 1, last)
    if cls is MaxPool:
        return MaxPool(source, target, _window(value, name))
    factors = _requantization(value, activations[target], name, last)
    if cls is Rescale:
        return Rescale(source, target, factors)
    if cls is AveragePool:
        return AveragePool(source, target, _window(value, name), factors)
    assert issubclass(cls, Filters)
    window, channels = _window(value, name), activations[source].channels
    groups = _whole(value.get("groups"), f"groups of {name}", 1, channels)
    terms = _whole(value.get("terms", 1), f"terms of {name}", 1, _MOST_TERMS if cls is Adder else 1)
    shape = (activations[target].channels, *([terms] * (terms > 1)), *window.kernel, channels // groups)
    weight = torch.zeros(shape, dtype=cls.weight_dtype)
    return cls(source, target, weight, window, groups, factors)


def _linear(value: Mapping[str, Any], number: int, source: Activation, name: str) -> Linear:
    outputs = _whole(value.get("outputs"), f"outputs of {name}", 1)
    weight = torch.zeros(outputs, source.height * source.width * source.channels, dtype=torch.int8)
    return Linear(number, weight, *_factors(outputs), scale=_scale(value.get("scale"), name))


def _window(value: Mapping[str, Any], name: str) -> Window:
    pairs = []
    for field, least in zip(_WINDOW, (1, 1, 0, 1), strict=True):
        pair = value.get(field)
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{field} of {name} is {pair!r:.80}, expected two whole numbers")
        pairs.append((_whole(pair[0], f"{field} of {name}", least), _whole(pair[1], f"{field} of {name}", least)))
    return Window(*pairs)


def _requantization(value: Mapping[str, Any], target: Activation, name: str, last: int) -> Requantization:
    multiplier, offset, shift = _factors(target.channels)
    residual = value.get("residual")
    if residual is not None:
        _whole(residual, f"residual of {name}", 0, last)
    return Requantization(
        multiplier=multiplier,
        offset=offset,
        shift=shift,
        scale_exponent=torch.zeros_like(shift),
        quant_max=_whole(value.get("quant_max"), f"quant_max of {name}", 1, 255),
        residual=residual,
        residual_multiplier=None if residual is None else torch.zeros_like(multiplier),
    )


def _factors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (torch.int32, torch.int64, torch.uint8)
    multiplier, offset, shift = (torch.zeros(channels, dtype=dtype) for dtype in kinds)
    return multiplier, offset, shift
