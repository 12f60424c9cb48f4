"""The law of quantized networks: what a plan computes, written from its formulas in int64, slow and never optimized."""

import torch
import torch.nn.functional as F
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
)


def quantize(images: Tensor, scale: float, zero: Tensor) -> Tensor:
    """Real values to bytes: ``clamp(floor(x / scale + zero + 1/2), 0, 255)``, each operation rounded to fp32.

    Args:
        images: ``[N, C, H, W]`` fp32.
        scale: Real value of one unit.
        zero: The byte that stands for 0, ``[C]`` uint8.

    Returns:
        ``[N, H, W, C]`` uint8.
    """
    reciprocal = torch.tensor(1 / scale, dtype=torch.float32)
    codes = torch.floor(images.float() * reciprocal + (zero.float() + 0.5)[:, None, None])
    return codes.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def run(plan: IntegerPlan, image: Tensor) -> Tensor:
    """Carry out a plan.

    Args:
        plan: The network.
        image: ``[N, H, W, C]`` uint8.

    Returns:
        int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.
    """
    return trace(plan, image)[1]


def trace(plan: IntegerPlan, image: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Carry out a plan and keep all that it writes.

    Args:
        plan: The network.
        image: ``[N, H, W, C]`` uint8.

    Returns:
        The bytes ``[N, H, W, C]`` of each activation by its number (the image is 0), and what ``run`` returns.
    """
    values: dict[int, Tensor] = {0: image}
    for step in plan.steps:
        result = _carry_out(step, plan.activations, values)
        if not isinstance(step, Linear):
            values[step.output] = result
    return values, result


def _carry_out(step: Step, activations: tuple[Activation, ...], values: dict[int, Tensor]) -> Tensor:
    source = values[step.input]
    if isinstance(step, Linear):
        sums = source.reshape(len(source), -1).long() @ step.weight.long().T
        logits = (sums * step.multiplier.long() + step.offset) >> step.shift.long()
        return logits.to(torch.int32)
    if isinstance(step, MaxPool):
        return _max_pool(source, step.window, activations[step.output])
    return requantize(_sums(step, source, activations[step.input]), step.requantization, values)


def _sums(step: Adder | Convolution | Rescale | AveragePool, source: Tensor, activation: Activation) -> Tensor:
    """What a step sums, ``[N, H', W', O]`` int64."""
    if isinstance(step, Rescale):
        return source.long()
    if isinstance(step, AveragePool):
        return windows(source, step.window, torch.zeros_like(activation.zero)).sum((3, 4))
    taps = windows(source, step.window, activation.zero)  # [N, H', W', kh, kw, C]
    parts = []
    for x, w in zip(taps.chunk(step.groups, -1), step.weight.long().chunk(step.groups), strict=True):
        for filter in w:  # one at a time, so that memory stays that of the windows
            terms = (x - filter).abs() if isinstance(step, Adder) else x * filter
            parts.append(terms.sum((3, 4, 5)))
    return torch.stack(parts, -1)


def windows(source: Tensor, window: Window, zero: Tensor) -> Tensor:
    """All windows of bytes ``[N, H, W, C]``, padded by ``zero``: ``[N, H', W', kh, kw, C]`` int64."""
    (kernel_rows, kernel_columns), (step_rows, step_columns), (rows, columns), (down, across) = window
    batch, height, width, channels = source.shape
    padded = zero.long().expand(batch, height + 2 * rows, width + 2 * columns, channels).clone()
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
    """Sums ``[N, H, W, O]`` int64 to bytes of the same shape, by the formula of ``plan.py``.

    Args:
        sums: What the step summed.
        requantization: Its factors.
        values: The bytes of the activations by number, for the residual.
    """
    total = sums * requantization.multiplier.long() + requantization.offset
    if requantization.residual is not None and requantization.residual_multiplier is not None:
        total = total + values[requantization.residual].long() * requantization.residual_multiplier.long()
    codes = (total.clamp(min=0) >> requantization.shift.long()).clamp(max=requantization.levels)
    return (codes << requantization.exponent.long()).to(torch.uint8)


def _max_pool(source: Tensor, window: Window, output: Activation) -> Tensor:
    """Padding and what a size rounded up adds are below every byte, so they never win."""
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
