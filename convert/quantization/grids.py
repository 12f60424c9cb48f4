"""Grids: the real values that the bytes of an activation stand for, and values and weights rounded to them.

A code ``k`` of channel ``c`` stands for ``scale · 2^scale_exponent[c] · (k - zero_point[c])``. The weights of an adder
layer lie on the grid of its input, since only a common step size gives ``|s·x - s·w| = s·|x - w|`` (arXiv 2101.10015).
Weights outside the range of the grid are clamped to it without an error, since no value of the input is outside it:
``|x - w| = |x - r| + (w - r)`` for ``w > r ≥ x``, and likewise at the lower end (arXiv 2212.10200, section 3; for the
output of a ReLU, whose lower end is 0, also DAC 2025's NN-AdderNet). Below 8 bits, groups of channels have their own
step sizes, powers of two times the finest one, so that bytes of different groups can still be subtracted as they are.
"""

import dataclasses
import math

import torch
from torch import Tensor

from ...adder_layers.geometry import term_factors, terms_first

BYTE_BITS = 8
_ROUNDS = 50  # of k-means, which needs a handful


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that the codes of an activation stand for.

    Args:
        scale: Real value of one unit of the byte, which is the finest step size.
        zero_point: Code that stands for 0, ``[C]`` fp32.
        scale_exponent: Binary logarithm of a channel's step size divided by ``scale``, ``[C]`` fp32.
        quant_max: Largest code, ``2^bits - 1``.
    """

    scale: float
    zero_point: Tensor
    scale_exponent: Tensor
    quant_max: int

    @property
    def step_size(self) -> Tensor:
        """Real value of one code, ``[C]`` fp32."""
        return self.scale * torch.exp2(self.scale_exponent)

    @property
    def low(self) -> Tensor:
        """Smallest value, ``[C]``."""
        return -self.zero_point * self.step_size

    @property
    def high(self) -> Tensor:
        """Largest value, ``[C]``."""
        return (self.quant_max - self.zero_point) * self.step_size

    def nearest(self, values: Tensor, channel_shape: tuple[int, ...]) -> Tensor:
        """Round values to the grid; the gradient passes straight through in its range, and is 0 outside.

        Args:
            values: Values of any shape.
            channel_shape: Shape to which ``[C]`` is viewed so that it broadcasts to the values.

        Returns:
            Values of the same shape.
        """
        step_size, zero_point, low, high = (
            each.view(channel_shape) for each in (self.step_size, self.zero_point, self.low, self.high)
        )
        clamped = torch.minimum(torch.maximum(values, low), high)
        codes = torch.floor(clamped.detach() / step_size + (zero_point + 0.5)).clamp_(0, self.quant_max)
        return clamped + ((codes - zero_point) * step_size - clamped.detach())

    def weights(self, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Round the weights of an adder layer to the grid of its input.

        Args:
            weight: ``[O, C / groups, kh, kw]``, with T terms ``[O, C / groups, T, kh, kw]``.
            groups: Number of channel groups.

        Returns:
            Weights of the same shape whose gradient passes unchanged, and what clamping removed from the distances of
            each filter, ``[O]``, which is to be added to them.
        """
        shape = (groups, 1, -1, *([1] * (weight.ndim - 2)))
        rows = weight.detach().unflatten(0, (groups, -1))  # [G, O / G, C / G, ...]
        low, high = self.low.view(shape), self.high.view(shape)
        inside = torch.minimum(torch.maximum(rows, low), high)
        removed = terms_first((rows - inside).abs().flatten(0, 1))  # [T, O, C / G, kh, kw]
        excess = term_factors(len(removed), removed) @ removed.sum((2, 3, 4))
        return weight + (self.nearest(inside, shape).flatten(0, 1) - weight).detach(), excess


def signed_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize the weights of a convolution with a step size for each filter.

    Below 8 bits the step size is the one of least squared error among several fractions of the largest weight.

    Args:
        weight: ``[O, …]``.
        bits: Bits of a code.

    Returns:
        Codes ``[O, …]`` from ``-r`` to ``r`` with ``r = 2^(bits - 1) - 1``, and step sizes ``[O]``.
    """
    rows, quant_max = weight.detach().flatten(1), 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1).clamp_min(torch.finfo(rows.dtype).tiny * 2**30) / quant_max
    best, least = largest, torch.full_like(largest, math.inf)
    for share in torch.linspace(0.4, 1, 25).tolist() if bits < BYTE_BITS else (1.0,):
        step_size = share * largest
        codes = (rows / step_size[:, None]).round().clamp(-quant_max, quant_max)
        error = (codes * step_size[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, step_size, best), torch.minimum(error, least)
    codes = (rows / best[:, None]).round().clamp(-quant_max, quant_max)
    return codes.view_as(weight), best


def grid_for(low: Tensor, high: Tensor, bits: int, *, ceiling: float = math.inf, unit: float | None = None) -> Grid:
    """Return a grid for channels with values from ``low`` to ``high``.

    Args:
        low: Smallest value of each channel, ``[C]``, at most 0.
        high: Largest value of each channel, ``[C]``, at least 0.
        bits: Bits of a code.
        ceiling: Upper bound of the activation function: no code may stand for more.
        unit: If given, the scale is a power of two times this.
    """
    quant_max, most = 2**bits - 1, BYTE_BITS - bits
    spans = high - low
    spans = spans.clamp_min(max(float(spans.max()), 1e-6) * 2.0**-20)
    scale_exponent = torch.zeros_like(spans)
    top = float(spans.max())
    if most:
        scale_exponent, base = channel_exponents(spans, most)
        top = base * 2.0**most
    top = min(top, ceiling) if float(low.min()) == 0 else top
    scale = top / (quant_max << most)
    if unit is not None:
        power = math.log2(scale / unit)
        scale = unit * 2.0 ** (math.floor(power) if math.isfinite(ceiling) else round(power))
    step_size = scale * torch.exp2(scale_exponent)
    zero_point = (-low / step_size).round().clamp(0, quant_max)
    return Grid(float(torch.tensor(scale, dtype=torch.float32)), zero_point, scale_exponent, quant_max)


def channel_exponents(spans: Tensor, most: int) -> tuple[Tensor, float]:
    """Group channels by k-means on the logarithms of their spans, with centers a whole number of octaves apart.

    Args:
        spans: Difference of the largest and the smallest value of each channel, ``[C]``, positive.
        most: Largest exponent; there are ``most + 1`` groups.

    Returns:
        Exponents ``[C]``, and the span of the finest group.
    """
    octaves = spans.double().log2()
    alive = octaves > octaves.max() - most - 1  # dead channels should not pull the centers down
    base = float(octaves.max()) - most
    for _ in range(_ROUNDS):
        exponent = (octaves - base).round().clamp(0, most)
        moved = float((octaves - exponent)[alive].mean())
        if moved == base:
            break
        base = moved
    return exponent.to(spans.dtype), 2.0**base
