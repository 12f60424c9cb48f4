"""A plan as JSON without its tensors, and a plan of that form filled with zeros: so that weights are loaded as usual.

The shapes of all tensors follow from the structure. What is read here may come from somebody else: every number is
checked before anything is allocated, and ``check_plan`` has the last word once the tensors are there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..geometry import Window
from .plan import (
    Activation,
    Adder,
    AveragePool,
    Convolution,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
    requantization_of,
    step_tensors,
)

_MOST = 1 << 24  # channels, pixels along a side and the like: far more than any image has
_WINDOW = ("kernel", "stride", "padding", "dilation")


def structure_of(plan: IntegerPlan) -> dict[str, Any]:
    """What a plan is besides its tensors, JSON-ready."""
    return {
        "activations": [[each.channels, each.height, each.width, each.scale] for each in plan.activations],
        "steps": [_step_structure(step, path) for step, path in zip(plan.steps, plan.paths, strict=True)],
    }


def _step_structure(step: Step, path: str) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": step.kind, "path": path, "input": step.input}
    if isinstance(step, Linear):
        return {**found, "outputs": len(step.offset), "scale": step.scale}
    found["output"] = step.output
    if not isinstance(step, Rescale):
        found |= {name: list(value) for name, value in zip(_WINDOW, step.window, strict=True)}
    if isinstance(step, Adder | Convolution):
        found["groups"] = step.groups
    factors = requantization_of(step)
    if factors is not None:
        found["levels"] = factors.levels
        if factors.residual is not None:
            found["residual"] = factors.residual
    return found


def empty_plan(structure: Any) -> IntegerPlan:
    """A plan of that structure with zeros for tensors.

    Raises:
        ValueError: The structure is not one that ``structure_of`` gives; the message says where.
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
    """All tensors of a plan by name, such as ``steps.3.weight``."""
    for number, activation in enumerate(plan.activations):
        yield f"activations.{number}.zero", activation.zero
    for number, step in enumerate(plan.steps):
        for name, tensor in step_tensors(step).items():
            yield f"steps.{number}.{name}", tensor


def with_tensors(plan: IntegerPlan, tensors: Mapping[str, Tensor]) -> IntegerPlan:
    """The same plan with other tensors, by the names of ``tensors_of``."""
    activations = [
        replace(each, zero=tensors[f"activations.{number}.zero"]) for number, each in enumerate(plan.activations)
    ]
    return replace(
        plan,
        activations=tuple(activations),
        steps=tuple(_with_tensors(step, f"steps.{number}.", tensors) for number, step in enumerate(plan.steps)),
    )


def _with_tensors(step: Step, prefix: str, tensors: Mapping[str, Tensor]) -> Step:
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if isinstance(step, MaxPool):
        return step
    if isinstance(step, Linear):
        return replace(step, **own)  # type: ignore[arg-type]
    weight = {"weight": own.pop("weight")} if "weight" in own else {}
    factors = replace(step.requantization, **own)  # type: ignore[arg-type]
    return replace(step, requantization=factors, **weight)  # type: ignore[arg-type]


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
    source = _whole(value.get("input"), f"input of {name}", 0, last)
    before = activations[source]
    if kind == Linear.kind:
        outputs = _whole(value.get("outputs"), f"outputs of {name}", 1)
        weight = torch.zeros(outputs, before.height * before.width * before.channels, dtype=torch.int8)
        factors = _factors(outputs)
        return Linear(source, weight, *factors[:3], scale=_scale(value.get("scale"), name))
    target = _whole(value.get("output"), f"output of {name}", 1, last)
    if kind == Rescale.kind:
        return Rescale(source, target, _requantization(value, activations[target], name, last))
    window = _window(value, name)
    if kind == MaxPool.kind:
        return MaxPool(source, target, window)
    if kind == AveragePool.kind:
        return AveragePool(source, target, window, _requantization(value, activations[target], name, last))
    cls = next((each for each in (Adder, Convolution) if each.kind == kind), None)
    if cls is None:
        raise ValueError(f"kind of {name} is {kind!r:.80}, which this release does not know: install a newer adderkit")
    groups = _whole(value.get("groups"), f"groups of {name}", 1, before.channels)
    shape = (activations[target].channels, *window.kernel, before.channels // groups)
    weight = torch.zeros(shape, dtype=cls.weight_dtype)
    return cls(source, target, weight, window, groups, _requantization(value, activations[target], name, last))


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
        exponent=torch.zeros_like(shift),
        levels=_whole(value.get("levels"), f"levels of {name}", 1, 255),
        residual=residual,
        residual_multiplier=None if residual is None else torch.zeros_like(multiplier),
    )


def _factors(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (torch.int32, torch.int64, torch.uint8)
    multiplier, offset, shift = (torch.zeros(channels, dtype=dtype) for dtype in kinds)
    return multiplier, offset, shift
