"""Grids: which real values the bytes of an activation stand for, and values and weights rounded to them.

A code ``k`` of channel ``c`` stands for ``scale · 2^exponent[c] · (k - zero[c])``. An adder layer's weights lie on the
grid of its input, since only a common step gives ``|s·x - s·w| = s·|x - w|`` (arXiv 2101.10015). What lies beyond the
grid's ends is clamped to them without an error, for no value of the input passes them either:
``|x - w| = |x - r| + (w - r)`` for ``w > r ≥ x``, and likewise below (arXiv 2212.10200, section 3; after a ReLU, whose
lower end is 0, also DAC 2025's NN-AdderNet). Below 8 bits, groups of channels have steps of their own, powers of two
times the finest one, so that bytes of different groups can still be subtracted as they are.
"""

import dataclasses
import math

import torch
from torch import Tensor

BYTE_BITS = 8
_ROUNDS = 50  # of k-means, which needs a handful


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that an activation's codes stand for.

    Args:
        scale: Real value of one unit of the byte, the finest step.
        zero: Code that stands for 0, ``[C]`` fp32.
        exponent: Of two, how much coarser a channel's step is, ``[C]`` fp32.
        levels: Largest code, ``2^bits - 1``.
    """

    scale: float
    zero: Tensor
    exponent: Tensor
    levels: int

    @property
    def step(self) -> Tensor:
        """Real value of one code, ``[C]`` fp32."""
        return self.scale * torch.exp2(self.exponent)

    @property
    def low(self) -> Tensor:
        """Least value, ``[C]``."""
        return -self.zero * self.step

    @property
    def high(self) -> Tensor:
        """Largest value, ``[C]``."""
        return (self.levels - self.zero) * self.step

    def nearest(self, values: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
        """The grid's nearest values; the gradient passes where the grid reaches, and is 0 beyond (straight-through).

        Args:
            values: Of any shape.
            channel_shape: What ``[C]`` is viewed as to go with them.
        """
        step, zero, low, high = (each.view(channel_shape) for each in (self.step, self.zero, self.low, self.high))
        clamped = torch.minimum(torch.maximum(values, low), high)
        codes = torch.floor(clamped.detach() / step + (zero + 0.5)).clamp_(0, self.levels)
        return clamped + ((codes - zero) * step - clamped.detach())

    def weights(self, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """An adder layer's weights on the grid of its input, and what clamping took from each filter's distances.

        Args:
            weight: ``[O, C / groups, kh, kw]``.
            groups: Channel groups.

        Returns:
            ``[O, C / groups, kh, kw]`` with the gradient passing unchanged, and the excess ``[O]``, to be added to
            the distances.
        """
        shape = (groups, 1, -1, 1, 1)
        rows = weight.detach().unflatten(0, (groups, -1))  # [G, O / G, C / G, kh, kw]
        low, high = self.low.view(shape), self.high.view(shape)
        inside = torch.minimum(torch.maximum(rows, low), high)
        excess = (rows - inside).abs().sum((2, 3, 4)).flatten()
        return weight + (self.nearest(inside, shape).flatten(0, 1) - weight).detach(), excess


def signed_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A convolution's weights with a step for each filter: codes ``[O, …]`` from -r to r, and steps ``[O]``.

    Below 8 bits the step is the one of least squared error among shares of the largest weight.
    """
    rows, most = weight.detach().flatten(1), 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1).clamp_min(torch.finfo(rows.dtype).tiny * 2**30) / most
    best, least = largest, torch.full_like(largest, math.inf)
    for share in torch.linspace(0.4, 1, 25).tolist() if bits < BYTE_BITS else (1.0,):
        step = share * largest
        codes = (rows / step[:, None]).round().clamp(-most, most)
        error = (codes * step[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    codes = (rows / best[:, None]).round().clamp(-most, most)
    return codes.view_as(weight), best


def grid_for(low: Tensor, high: Tensor, bits: int, *, ceiling: float = math.inf, unit: float | None = None) -> Grid:
    """A grid for channels that reach from ``low`` to ``high``.

    Args:
        low: ``[C]``, at most 0.
        high: ``[C]``, at least 0.
        bits: Of a code.
        ceiling: What an activation function clamps to: no code may lie above it.
        unit: The scale is to be a power of two times this; ``None``: any.
    """
    levels, most = 2**bits - 1, BYTE_BITS - bits
    spans = high - low
    spans = spans.clamp_min(max(float(spans.max()), 1e-6) * 2.0**-20)
    exponent = torch.zeros_like(spans)
    top = float(spans.max())
    if most:
        exponent, base = channel_exponents(spans, most)
        top = base * 2.0**most
    top = min(top, ceiling) if float(low.min()) == 0 else top
    scale = top / (levels << most)
    if unit is not None:
        power = math.log2(scale / unit)
        scale = unit * 2.0 ** (math.floor(power) if math.isfinite(ceiling) else round(power))
    step = scale * torch.exp2(exponent)
    zero = (-low / step).round().clamp(0, levels)
    return Grid(float(torch.tensor(scale, dtype=torch.float32)), zero, exponent, levels)


def channel_exponents(spans: Tensor, most: int) -> tuple[Tensor, float]:
    """Groups of channels by k-means on the logarithm of their spans, with centers a whole number of octaves apart.

    Args:
        spans: What each channel reaches over, ``[C]``, positive.
        most: Largest exponent; there are ``most + 1`` groups.

    Returns:
        Exponents ``[C]``, and the span of the finest group.
    """
    octaves = spans.double().log2()
    alive = octaves > octaves.max() - most - 1  # a channel that is dead should not draw the others down
    base = float(octaves.max()) - most
    for _ in range(_ROUNDS):
        exponent = (octaves - base).round().clamp(0, most)
        moved = float((octaves - exponent)[alive].mean())
        if moved == base:
            break
        base = moved
    return exponent.to(spans.dtype), 2.0**base
