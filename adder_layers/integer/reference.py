"""Reference implementation of integer plans: a direct transcription of the formulas in int64, not optimized."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

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
)


def quantize(images: Tensor, scale: float, zero_point: Tensor) -> Tensor:
    """Quantize real values: ``clamp(floor(x / scale + zero_point + 1/2), 0, 255)``, each operation rounded to fp32.

    Args:
        images: ``[N, C, H, W]`` fp32.
        scale: Real value of one unit of the byte.
        zero_point: The byte that stands for 0, ``[C]`` uint8.

    Returns:
        ``[N, H, W, C]`` uint8.
    """
    reciprocal = torch.tensor(1 / scale, dtype=torch.float32)
    codes = torch.floor(images.float() * reciprocal + (zero_point.float() + 0.5)[:, None, None])
    return codes.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def run(plan: IntegerPlan, image: Tensor) -> Tensor:
    """Run a plan.

    Args:
        plan: The network.
        image: ``[N, H, W, C]`` uint8.

    Returns:
        int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.
    """
    return trace(plan, image)[1]


def trace(plan: IntegerPlan, image: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Run a plan and keep all activations.

    Args:
        plan: The network.
        image: ``[N, H, W, C]`` uint8.

    Returns:
        The bytes ``[N, H, W, C]`` of each activation by its number (the image is 0), and the result of ``run``.
    """
    values: dict[int, Tensor] = {0: image}
    for step in plan.steps:
        result = run_step(step, plan.activations, values)
        if not isinstance(step, Linear):
            values[step.output] = result
    return values, result


def run_step(step: Step, activations: tuple[Activation, ...], values: dict[int, Tensor]) -> Tensor:
    """Run one step.

    Args:
        step: The step.
        activations: All activations of its plan.
        values: The bytes ``[N, H, W, C]`` uint8 of the activations that were written so far, by number.

    Returns:
        The bytes that it writes, or int32 logits ``[N, classes]``.
    """
    source = values[step.input]
    match step:
        case Adder() | Convolution() | Rescale() | AveragePool():
            return requantize(step_sums(step, source, activations[step.input]), step.requantization, values)
        case MaxPool():
            return _max_pool(source, step.window, activations[step.output])
        case Linear():
            sums = source.reshape(len(source), -1).long() @ step.weight.long().T
            logits = (sums * step.multiplier.long() + step.offset) >> step.shift.long()
            return logits.to(torch.int32)
        case _:
            assert_never(step)


def step_sums(step: Adder | Convolution | Rescale | AveragePool, source: Tensor, activation: Activation) -> Tensor:
    """Compute the sums of a step, before requantization.

    Args:
        step: The step.
        source: Bytes ``[N, H, W, C]`` that it reads.
        activation: The activation that they belong to.

    Returns:
        ``[N, H', W', O]`` int64.
    """
    match step:
        case Adder() | Convolution():
            taps = windows(source, step.window, activation.zero_point)  # [N, H', W', kh, kw, C]
            parts = []
            weight = step.weight.long().reshape(len(step.weight), step.terms, *step.weight.shape[-3:])
            for x, w in zip(taps.chunk(step.groups, -1), weight.chunk(step.groups), strict=True):
                for filter in w:  # one at a time, so that memory stays that of the windows
                    terms = [(x - each).abs() if isinstance(step, Adder) else x * each for each in filter]
                    parts.append(sum(each.sum((3, 4, 5)) << step.terms - 1 - j for j, each in enumerate(terms)))
            return torch.stack(parts, -1)
        case AveragePool():
            return windows(source, step.window, torch.zeros_like(activation.zero_point)).sum((3, 4))
        case Rescale():
            return source.long()
        case _:
            assert_never(step)


def windows(source: Tensor, window: Window, zero_point: Tensor) -> Tensor:
    """Return all windows of bytes ``[N, H, W, C]``, padded with ``zero_point``: ``[N, H', W', kh, kw, C]`` int64."""
    (kernel_rows, kernel_columns), (step_rows, step_columns), (rows, columns), (down, across) = window
    batch, height, width, channels = source.shape
    padded = zero_point.long().expand(batch, height + 2 * rows, width + 2 * columns, channels).clone()
    padded[:, rows : rows + height, columns : columns + width] = source.long()
    out_rows, out_columns = window.output_size(height, width)
    result = padded.new_empty(batch, out_rows, out_columns, kernel_rows, kernel_columns, channels)
    for i in range(kernel_rows):
        for j in range(kernel_columns):
            top, left = i * down, j * across
            result[:, :, :, i, j] = padded[
                :, top : top + out_rows * step_rows : step_rows, left : left + out_columns * step_columns : step_columns
            ][:, :out_rows, :out_columns]
    return result


def requantize(sums: Tensor, requantization: Requantization, values: dict[int, Tensor]) -> Tensor:
    """Requantize a step's sums to bytes, by the formula in ``plan.py``.

    Args:
        sums: ``[N, H, W, O]`` int64.
        requantization: The step's factors.
        values: The bytes of the activations by number, for the residual.

    Returns:
        ``[N, H, W, O]`` uint8.
    """
    total = sums * requantization.multiplier.long() + requantization.offset
    if requantization.residual is not None and requantization.residual_multiplier is not None:
        total = total + values[requantization.residual].long() * requantization.residual_multiplier.long()
    codes = (total.clamp(min=0) >> requantization.shift.long()).clamp(max=requantization.quant_max)
    return (codes << requantization.scale_exponent.long()).to(torch.uint8)


def _max_pool(source: Tensor, window: Window, output: Activation) -> Tensor:
    """Pool bytes; padding, and what an output size rounded up adds, is below every byte and never chosen."""
    (kernel_rows, kernel_columns), (step_rows, step_columns), (rows, columns), (down, across) = window
    values = source.permute(0, 3, 1, 2).long()
    below = (output.height - 1) * step_rows + (kernel_rows - 1) * down + 1 - rows - source.shape[1]
    right = (output.width - 1) * step_columns + (kernel_columns - 1) * across + 1 - columns - source.shape[2]
    padded = F.pad(values, (columns, max(right, 0), rows, max(below, 0)), value=-1)
    taps = [
        padded[:, :, i * down :, j * across :][:, :, ::step_rows, ::step_columns][:, :, : output.height, : output.width]
        for i in range(kernel_rows)
        for j in range(kernel_columns)
    ]
    return torch.stack(taps).amax(0).permute(0, 2, 3, 1).to(torch.uint8).contiguous()
