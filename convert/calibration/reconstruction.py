"""Fit the filters of one adder layer to a convolution's output: choose scales, clamp to the input range, then run Adam.

The objective is correlation, channel by channel: the BatchNorm that follows absorbs any offset and any positive slope.
"""

from typing import Any

import torch
from torch import Tensor

from ...adder_layers.conv import adder_conv2d

# From weights in the middle of the input range to nearly linear in x (every weight outside the range, where -|x - w| is
# x or -x plus a constant). Which is best depends on the layer, and on the filter.
SCALES = tuple(4.0 * 2 ** (step / 2) for step in range(17))  # 4 … 1024
# Windows per Adam step; with groups, where each filter sees few channels, fewer windows are enough.
BATCH, GROUPED_BATCH = 1024, 256
LEARNING_RATE = 0.12
SIGN_SCALE = 1e4


class _Distance(torch.autograd.Function):
    """``-Σ_k |x - w|`` by the adder operators, with the true derivative ``sign(x - w)`` for the weight.

    The derivative is computed by the input gradient operator with x and w exchanged: it sums ``HardTanh(x - w)``, which
    equals the sign when both are scaled up.
    """

    @staticmethod
    def forward(ctx: Any, windows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(windows, weight)
        output = adder_conv2d(_as_image(windows), _as_filters(weight), groups=len(weight))
        return output.reshape(len(weight), -1, windows.shape[1]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        windows, weight = ctx.saved_tensors
        filters, image = _as_filters(windows * SIGN_SCALE), _as_image(weight * SIGN_SCALE)
        slopes = grad.reshape(1, -1, 1, grad.shape[2]).contiguous()
        unit = ([1, 1], [0, 0], [1, 1])
        result = torch.ops.adderkit.adder_conv2d_input_grad(slopes, image, filters, *unit, len(weight))
        return None, result.reshape(len(weight), -1, weight.shape[1]).transpose(1, 2)


def _as_image(rows: Tensor) -> Tensor:
    """Lay out ``[G, R, K]`` as an image ``[1, G · K, 1, R]`` of one long row, which is fastest in the kernels."""
    return rows.transpose(1, 2).reshape(1, -1, 1, rows.shape[1]).contiguous()


def _as_filters(rows: Tensor) -> Tensor:
    """Lay out ``[G, R, K]`` as 1x1 filters ``[G · R, K, 1, 1]``."""
    return rows.reshape(-1, rows.shape[2], 1, 1).contiguous()


def distances(windows: Tensor, weight: Tensor) -> Tensor:
    """Compute ``-Σ_k |x - w|``, ``[G, S, O]``, for windows ``[G, S, K]`` and filters ``[G, O, K]``."""
    result: Tensor = _Distance.apply(windows, weight)
    return result


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Compute Pearson correlation over samples, ``[G, S, O]`` twice to ``[G, O]``; 0 for a constant channel."""
    first = first - first.mean(1, keepdim=True)
    second = second - second.mean(1, keepdim=True)
    norms = first.norm(dim=1) * second.norm(dim=1)
    result: Tensor = (first * second).sum(1) / norms.clamp_min(1e-12)
    return result


def input_ranges(windows: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest value of each input channel: windows ``[G, S, K]`` to two ``[G, 1, K]``.

    Outside that range a term is ``±x`` plus a constant, so a weight can be clamped to it without loss.

    Args:
        windows: Windows of the input, ``[G, S, K]``.
        taps: ``kh · kw``, the number of positions of a filter.
    """
    by_channel = windows.unflatten(2, (-1, taps))  # [G, S, C, taps]
    low, high = (
        extreme.repeat_interleave(taps, dim=1)[:, None]
        for extreme in (by_channel.amin((1, 3)), by_channel.amax((1, 3)))
    )
    return low, high


@torch.no_grad()
def best_scales(windows: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Choose the factor of each filter with which its distances correlate best with the convolution's output.

    Args:
        windows: Windows of the input, ``[G, S, K]``.
        target: Output of the convolution, ``[G, S, O]``.
        weight: Filters of the convolution, ``[G, O, K]``.

    Returns:
        Factors from ``SCALES``, ``[G, O, 1]``.
    """
    few = slice(0, 2 * BATCH)
    scores = [correlation(distances(windows[:, few], scale * weight), target[:, few]) for scale in SCALES]
    return torch.tensor(SCALES).to(weight)[torch.stack(scores).argmax(0)][..., None]


@torch.enable_grad()
def reconstruct(
    windows: Tensor, target: Tensor, weight: Tensor, taps: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Fit filters so that their distances follow the convolution's output.

    Args:
        windows: Windows of the layer's input in the converted network, ``[G, S, K]``.
        target: Output of the convolution at the same positions, ``[G, S, O]``.
        weight: Filters of the convolution, ``[G, O, K]``.
        taps: ``kh · kw``, the number of positions of a filter.
        steps: Adam steps; with 0, only the scales are chosen.
        generator: Random generator of the mini-batches, on the CPU, so that they do not depend on the device.

    Returns:
        The fitted filters, ``[G, O, K]``.
    """
    fitted = best_scales(windows, target, weight) * weight
    if steps == 0:
        return fitted
    low, high = input_ranges(windows, taps)
    fitted = fitted.clamp(low, high).requires_grad_()
    optimizer = torch.optim.Adam([fitted], lr=LEARNING_RATE * float(windows.std()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch = BATCH if len(weight) == 1 else GROUPED_BATCH
    for _ in range(steps):
        chosen = torch.randint(windows.shape[1], (batch,), generator=generator).to(windows.device)
        loss = (
            1 - correlation(distances(windows.index_select(1, chosen), fitted), target.index_select(1, chosen)).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            fitted.clamp_(low, high)
    return fitted.detach()
