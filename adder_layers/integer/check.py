"""Reject plans that are inconsistent or could overflow, before anything is computed with them.

Sums are int32, and ``t`` of the requantization is int64. The largest values that they can take follow from weights and
factors by interval arithmetic, with each byte anywhere between 0 and 255: a plan that passes cannot overflow on any
image.
"""

import dataclasses
import math

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..geometry import POINT, Window
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
    reads,
    requantization_of,
)

SUM_LIMIT = 2**31 - 1
TOTAL_LIMIT = 2**62
LARGEST_SHIFT = 62
BYTE = 255


@dataclasses.dataclass(frozen=True)
class Extremes:
    """Bounds on what a step computes, over all images.

    Args:
        least: Smallest sum.
        largest: Largest sum.
        total: Largest ``|t|``, 0 if nothing is requantized.
    """

    least: int
    largest: int
    total: int


def check_plan(plan: IntegerPlan) -> list[Extremes]:
    """Check a whole plan.

    Args:
        plan: The network.

    Returns:
        The bounds of each step.

    Raises:
        ValueError: A step reads an activation that was not written, shapes, dtypes or sizes do not match, or something
            could overflow; the message names the step.
    """
    if not plan.steps or len(plan.paths) != len(plan.steps):
        raise ValueError(
            f"plan has {len(plan.steps)} steps and {len(plan.paths)} paths, expected equal numbers of at least 1"
        )
    for number, activation in enumerate(plan.activations):
        _check_activation(activation, f"activation {number}")
    written, found = {0}, []
    for index, (step, path) in enumerate(zip(plan.steps, plan.paths, strict=True)):
        name = f"step {index} ({step.kind} {path})"
        missing = [number for number in reads(step) if number not in written]
        if missing:
            raise ValueError(f"{name} reads activation {missing[0]}, which no earlier step writes")
        if isinstance(step, Linear):
            if index + 1 < len(plan.steps):
                raise ValueError(f"{name} is not the last step; nothing can follow the classifier")
        elif step.output in written or not 0 < step.output < len(plan.activations):
            raise ValueError(f"{name} writes activation {step.output}, expected one that nothing has written yet")
        else:
            written.add(step.output)
        _check_shapes(step, plan.activations, name)
        found.append(extremes(step))
        if max(abs(found[-1].least), found[-1].largest) > SUM_LIMIT or found[-1].total >= TOTAL_LIMIT:
            raise ValueError(
                f"{name} could overflow: {found[-1]}, expected sums and logits in int32, totals below 2^62"
            )
    return found


def extremes(step: Step) -> Extremes:
    """Return the bounds of a step, where each byte that it reads may be anything from 0 to 255."""
    low, high = _sum_range(step)
    requantization = requantization_of(step)
    if isinstance(step, Linear):
        totals = _largest(low, high, step.multiplier, step.offset)
        if any(total >> bits > SUM_LIMIT for total, bits in zip(totals, step.shift.tolist(), strict=True)):
            totals = [TOTAL_LIMIT]
    elif requantization is not None:
        totals = _largest(low, high, requantization.multiplier, requantization.offset)
        if requantization.residual_multiplier is not None:
            totals = [
                total + BYTE * abs(value)
                for total, value in zip(totals, requantization.residual_multiplier.tolist(), strict=True)
            ]
    else:
        totals = [0]
    return Extremes(min(low), max(high), max(totals))


def _sum_range(step: Step) -> tuple[list[int], list[int]]:
    """Return the smallest and the largest sum of each output channel, or one that holds for all of them."""
    match step:
        case Adder():
            weight = step.weight.long().reshape(len(step.weight), step.terms, -1)
            largest = torch.maximum(weight, BYTE - weight).sum(2).tolist()  # [O, T]
            totals = [sum(each << step.terms - 1 - j for j, each in enumerate(sums)) for sums in largest]
            return [0] * len(weight), totals
        case Convolution() | Linear():
            weight = step.weight.flatten(1).long()
            return (BYTE * weight.clamp(max=0).sum(1)).tolist(), (BYTE * weight.clamp(min=0).sum(1)).tolist()
        case AveragePool():
            return [0], [BYTE * step.window.kernel[0] * step.window.kernel[1]]
        case Rescale() | MaxPool():
            return [0], [BYTE]
        case _:
            assert_never(step)


def _largest(low: list[int], high: list[int], multiplier: Tensor, offset: Tensor) -> list[int]:
    channels = len(offset)
    lows, highs = (values * channels if len(values) == 1 else values for values in (low, high))
    return [
        max(abs(bound * factor + shift) for bound in (least, most))
        for least, most, factor, shift in zip(lows, highs, multiplier.tolist(), offset.tolist(), strict=True)
    ]


def _check_activation(activation: Activation, name: str) -> None:
    if min(activation.channels, activation.height, activation.width) < 1:
        raise ValueError(f"{name} has size {activation.channels}x{activation.height}x{activation.width}, expected >= 1")
    if not 0 < activation.scale < float("inf"):
        raise ValueError(f"{name} has scale {activation.scale}, expected a positive number")
    _check_tensor(activation.zero_point, (activation.channels,), torch.uint8, f"zero_point of {name}")


def _check_tensor(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(shape)} {dtype}")


def _check_shapes(step: Step, activations: tuple[Activation, ...], name: str) -> None:
    source = activations[step.input]
    match step:
        case Adder() | Convolution():
            _check_size(step.window, source, activations[step.output], name)
            _check_filters(step, source, activations[step.output], name)
        case AveragePool():
            window = step.window
            if window.padding != (0, 0) or window.dilation != (1, 1):
                raise ValueError(
                    f"{name} has padding {window.padding} and dilation {window.dilation}, expected 0 and 1"
                )
            _check_size(window, source, activations[step.output], name)
            _check_channels(source, activations[step.output], name)
        case MaxPool():
            _check_size(step.window, source, activations[step.output], name, rounded_up=True)
            _check_windows_hold_pixels(step.window, source, activations[step.output], name)
            _check_channels(source, activations[step.output], name)
        case Rescale():
            _check_size(POINT, source, activations[step.output], name)
            _check_channels(source, activations[step.output], name)
        case Linear():
            filters, values = len(step.offset), source.height * source.width * source.channels
            _check_tensor(step.weight, (filters, values), torch.int8, f"weight of {name}")
            _check_factors(step.multiplier, step.offset, step.shift, filters, name)
        case _:
            assert_never(step)
    requantization = requantization_of(step)
    if requantization is not None and not isinstance(step, Linear):
        _check_requantization(requantization, activations, activations[step.output], name)


def _check_filters(step: Filters, source: Activation, target: Activation, name: str) -> None:
    groups = step.groups
    if groups < 1 or source.channels % groups or target.channels % groups:
        raise ValueError(f"{name} has {groups} groups, expected a divisor of {source.channels} and {target.channels}")
    terms = (step.terms,) if isinstance(step, Adder) and step.terms > 1 else ()
    shape = (target.channels, *terms, *step.window.kernel, source.channels // groups)
    _check_tensor(step.weight, shape, step.weight_dtype, f"weight of {name}")


def _check_channels(source: Activation, target: Activation, name: str) -> None:
    if target.channels != source.channels:
        raise ValueError(f"{name} writes {target.channels} channels, expected {source.channels} as it reads")


def _check_size(window: Window, source: Activation, target: Activation, name: str, *, rounded_up: bool = False) -> None:
    for field, values in (("kernel", window.kernel), ("stride", window.stride)):
        if min(values) < 1:
            raise ValueError(f"{name} has {field} {values}, expected at least 1")
    if min(window.padding) < 0 or min(window.dilation) < 1:
        raise ValueError(f"{name} has padding {window.padding} and dilation {window.dilation}, expected >= 0 and >= 1")
    expected, size = window.output_size(source.height, source.width), (target.height, target.width)
    spare = int(rounded_up)
    if min(expected) < 1 or not all(least <= got <= least + spare for got, least in zip(size, expected, strict=True)):
        raise ValueError(f"{name} writes {size[0]}x{size[1]} pixels, expected {expected[0]}x{expected[1]}")


def _check_windows_hold_pixels(window: Window, source: Activation, target: Activation, name: str) -> None:
    axes = zip((target.height, target.width), (source.height, source.width), *window, strict=True)
    if not all(_windows_hold_pixels(*axis) for axis in axes):
        raise ValueError(f"{name} has windows that hold no pixel, expected padding and size as torch allows them")


def _windows_hold_pixels(outputs: int, length: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Return whether each window along an axis has a tap inside, in a time that does not grow with the kernel."""
    if (outputs - 1) * stride - padding >= length:
        return False
    # Windows that begin inside hold that pixel. Of the others, the first has most taps in the padding; where pixels
    # are fewer than the dilation, taps may also jump over all of them. That repeats with the remainders.
    before = min(outputs, -(-padding // stride))
    if before and -(-padding // dilation) >= kernel:
        return False
    period = 1 if length >= dilation else dilation // math.gcd(dilation, stride)
    return all((begin * stride - padding) % dilation < length for begin in range(min(before, period)))


def _check_requantization(
    requantization: Requantization, activations: tuple[Activation, ...], target: Activation, name: str
) -> None:
    filters = target.channels
    _check_factors(requantization.multiplier, requantization.offset, requantization.shift, filters, name)
    _check_tensor(requantization.scale_exponent, (filters,), torch.uint8, f"scale_exponent of {name}")
    largest = requantization.quant_max << int(requantization.scale_exponent.max())
    if requantization.quant_max < 1 or largest > BYTE:
        raise ValueError(
            f"{name} has quant_max {requantization.quant_max}, {largest} after shifting, expected 1 to {BYTE}"
        )
    if (requantization.residual is None) != (requantization.residual_multiplier is None):
        raise ValueError(f"{name} has a residual without a multiplier, or the reverse; expected both or none")
    if requantization.residual is not None and requantization.residual_multiplier is not None:
        _check_tensor(requantization.residual_multiplier, (filters,), torch.int32, f"residual_multiplier of {name}")
        other = activations[requantization.residual]
        if (other.channels, other.height, other.width) != (filters, target.height, target.width):
            raise ValueError(
                f"{name} adds activation {requantization.residual}, whose size differs from that of its output"
            )


def _check_factors(multiplier: Tensor, offset: Tensor, shift: Tensor, filters: int, name: str) -> None:
    _check_tensor(multiplier, (filters,), torch.int32, f"multiplier of {name}")
    _check_tensor(offset, (filters,), torch.int64, f"offset of {name}")
    _check_tensor(shift, (filters,), torch.uint8, f"shift of {name}")
    if int(shift.max()) > LARGEST_SHIFT:
        raise ValueError(f"{name} shifts by {int(shift.max())} bits, expected at most {LARGEST_SHIFT}")
