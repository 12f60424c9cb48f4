"""Fit the filters of one adder layer to a convolution's output: choose a start, then run Adam within the input range.

The objective is correlation, channel by channel: the BatchNorm that follows absorbs any offset and any positive slope.
"""

from typing import Any

import torch
from torch import Tensor

from ...adder_layers.conv import adder_conv2d
from ...adder_layers.geometry import term_factors
from .start import place_terms, slope_table

# Largest slope of a filter's weights, in units of their standard deviation: small factors cut off large weights, large
# ones waste the range of slopes that a term has. Which is best depends on the layer, and on the filter.
SCALES = tuple(0.35 * 2 ** (step / 3) for step in range(9))  # 0.35 … 2.2
# Windows per Adam step; with groups, where each filter sees few channels, fewer windows are enough.
BATCH, GROUPED_BATCH = 1024, 256
LEARNING_RATE = 0.12
SIGN_SCALE = 1e4


class _Distance(torch.autograd.Function):
    """``-Σ_j 2^-j Σ_k |x - w_j|`` by the adder operators, with the true derivative ``sign(x - w)`` for the weight.

    The derivative is computed by the input gradient operator with x and w exchanged: it sums ``HardTanh(x - w)``, which
    equals the sign when both are scaled up.
    """

    @staticmethod
    def forward(ctx: Any, windows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(windows, weight)
        filters = weight.flatten(0, 1).transpose(1, 2)[..., None, None]  # [G · O, K, T, 1, 1]
        output = adder_conv2d(_as_image(windows), filters.contiguous(), groups=len(weight))
        return output.reshape(len(weight), -1, windows.shape[1]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        windows, weight = ctx.saved_tensors
        groups, filters, terms, _ = weight.shape
        rows = weight.flatten(1, 2) * SIGN_SCALE  # [G, O · T, K]
        slopes = (grad[..., None] * term_factors(terms, grad)).reshape(1, -1, 1, filters * terms)
        unit = ([1, 1], [0, 0], [1, 1])
        result = torch.ops.adderkit.adder_conv2d_input_grad(
            slopes, _as_image(rows), _as_filters(windows * SIGN_SCALE), *unit, groups
        )
        return None, result.reshape(groups, -1, filters * terms).transpose(1, 2).reshape(weight.shape)


def _as_image(rows: Tensor) -> Tensor:
    """Lay out ``[G, R, K]`` as an image ``[1, G · K, 1, R]`` of one long row, which is fastest in the kernels."""
    return rows.transpose(1, 2).reshape(1, -1, 1, rows.shape[1]).contiguous()


def _as_filters(rows: Tensor) -> Tensor:
    """Lay out ``[G, R, K]`` as 1x1 filters ``[G · R, K, 1, 1]``."""
    return rows.reshape(-1, rows.shape[2], 1, 1).contiguous()


def distances(windows: Tensor, weight: Tensor) -> Tensor:
    """Compute ``-Σ_j 2^-j Σ_k |x - w_j|``, ``[G, S, O]``, for windows ``[G, S, K]`` and filters ``[G, O, T, K]``."""
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
def best_start(windows: Tensor, target: Tensor, weight: Tensor, taps: int, terms: int) -> Tensor:
    """Place the terms of each filter so that its distances correlate best with the convolution's output.

    Args:
        windows: Windows of the input, ``[G, S, K]``.
        target: Output of the convolution, ``[G, S, O]``.
        weight: Filters of the convolution, ``[G, O, K]``.
        taps: ``kh · kw``, the number of positions of a filter.
        terms: Terms of a weight, T.

    Returns:
        Filters ``[G, O, T, K]``, within the range of their inputs.
    """
    table = slope_table(windows, taps)
    few = slice(0, 2 * BATCH)
    slopes = weight / weight.std(2, keepdim=True).clamp_min(1e-12)
    best = torch.full_like(weight[..., 0], -torch.inf)
    chosen = weight.new_zeros(*weight.shape[:2], terms, weight.shape[2])
    for scale in SCALES:
        placed = place_terms(table, slopes / scale, terms, taps)
        score = correlation(distances(windows[:, few], placed), target[:, few])
        better = score > best
        best = torch.where(better, score, best)
        chosen = torch.where(better[..., None, None], placed, chosen)
    return chosen


@torch.enable_grad()
def reconstruct(
    windows: Tensor, target: Tensor, weight: Tensor, taps: int, steps: int, generator: torch.Generator, terms: int = 1
) -> Tensor:
    """Fit filters so that their distances follow the convolution's output.

    Args:
        windows: Windows of the layer's input in the converted network, ``[G, S, K]``.
        target: Output of the convolution at the same positions, ``[G, S, O]``.
        weight: Filters of the convolution, ``[G, O, K]``.
        taps: ``kh · kw``, the number of positions of a filter.
        steps: Adam steps; with 0, only the start is chosen.
        generator: Random generator of the mini-batches, on the CPU, so that they do not depend on the device.
        terms: Terms of a weight, T.

    Returns:
        The fitted filters, ``[G, O, T, K]``.
    """
    start = best_start(windows, target, weight, taps, terms)
    if steps == 0:
        return start
    low, high = input_ranges(windows, taps)
    fitted = [start[:, :, index].clone().requires_grad_() for index in range(terms)]
    rate = LEARNING_RATE * float(windows.std())
    optimizer = torch.optim.Adam([{"params": [term], "lr": rate * 2.0**-index} for index, term in enumerate(fitted)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch = BATCH if len(weight) == 1 else GROUPED_BATCH
    for _ in range(steps):
        chosen = torch.randint(windows.shape[1], (batch,), generator=generator).to(windows.device)
        output = distances(windows.index_select(1, chosen), torch.stack(fitted, 2))
        loss = 1 - correlation(output, target.index_select(1, chosen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for term in fitted:
                term.clamp_(low, high)
    return torch.stack(fitted, 2).detach()
