"""Fold a fake-quantized model into an integer plan: everything affine becomes part of the requantization.

The bias of a layer, the constants of clamped weights, zero points and BatchNorm are affine in the layer's sum ``a``:
``v = gain · a + shift``. In units of the output's step size that is a multiplier and an offset for each channel, in the
plan's form ``(a · multiplier + offset) >> shift``.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from typing_extensions import assert_never

from ...adder_layers.geometry import term_factors, terms_first
from ...adder_layers.integer.check import check_plan
from ...adder_layers.integer.plan import (
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
from ..calibration.batchnorm import affine_of
from ..errors import AdderkitError
from .fake_quantize import FakeQuantized, quantize_filters, window_weight
from .fused_ops import FusedOp
from .grids import Grid

_LARGEST = 2**31 - 1
_TOTAL_BITS = 61  # totals stay below 2^62, as check_plan requires
_LOGIT_BITS = 30
_LARGEST_SHIFT = 62


@dataclasses.dataclass(frozen=True)
class _Affine:
    """``gain · x + shift`` for each channel, ``[C]`` fp64."""

    gain: Tensor
    shift: Tensor

    def then(self, gain: Tensor, shift: Tensor) -> "_Affine":
        return _Affine(self.gain * gain, self.shift * gain + shift)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Sums of a step.

    Args:
        affine: The real value of a sum ``a``, as an affine function of it.
        largest: Largest ``|a|`` of each channel, ``[O]`` fp64.
    """

    affine: _Affine
    largest: Tensor


@torch.no_grad()
def fold(model: FakeQuantized) -> IntegerPlan:
    """Return the plan of a model whose grids are set and whose BatchNorm statistics are measured.

    If the first layer and the classifier stay in fp32, the plan begins after the one and ends before the other.

    Raises:
        AdderkitError: The plan could overflow.
    """
    builder = _PlanBuilder(model)
    for op in model.fused_graph.ops:
        if not builder.in_float(op):
            builder.add(op)
    plan = IntegerPlan(tuple(builder.activations), tuple(builder.steps), tuple(builder.paths))
    try:
        check_plan(plan)
    except ValueError as error:
        raise AdderkitError(f"the quantized network would not be valid: {error}") from error
    return plan


class _PlanBuilder:
    """Renumbers the activations and appends a step for each operation."""

    def __init__(self, model: FakeQuantized) -> None:
        self.model = model
        self.shifts = model.quantize_config.requant == "shift"
        self.activations: list[Activation] = []
        self.steps: list[Step] = []
        self.paths: list[str] = []
        self.numbers: dict[int, int] = {}
        first = next((op.output for op in model.fused_graph.ops if self.in_float(op)), 0)
        self._begin(first if model.grid(0) is None else 0)

    def in_float(self, op: FusedOp) -> bool:
        """Return whether an operation is not part of the plan."""
        return self.model.grid(op.input) is None or (
            op.kind == "linear" and self.model.quantize_config.first_last == "fp32"
        )

    def _begin(self, number: int) -> None:
        """Add the activation that the plan reads, in 8 bits, and its conversion if its own grid has fewer."""
        grid = self._grid(number)
        if grid.quant_max == 255 or number == 0:
            self.numbers[number] = self._activation(number, grid)
            return
        zero_point, exponent = grid.zero_point * torch.exp2(grid.scale_exponent), torch.zeros_like(grid.scale_exponent)
        source = self._activation(number, Grid(grid.scale, zero_point, exponent, 255))
        self.numbers[number] = self._activation(number, grid)
        affine = _Affine(torch.full_like(grid.step_size.double(), grid.scale), grid.low.double())
        factors = self._requantization(affine, grid, None, torch.full_like(affine.gain, 255))
        self._append(Rescale(source, self.numbers[number], factors), "input")

    def _grid(self, number: int) -> Grid:
        grid = self.model.grid(number)
        assert grid is not None
        return Grid(grid.scale, grid.zero_point.cpu(), grid.scale_exponent.cpu(), grid.quant_max)

    def _activation(self, number: int, grid: Grid) -> int:
        zero_point = (grid.zero_point * torch.exp2(grid.scale_exponent)).round().clamp(0, 255).to(torch.uint8)
        self.activations.append(Activation(*self.model.fused_graph.shapes[number], grid.scale, zero_point))
        return len(self.activations) - 1

    def _append(self, step: Step, path: str) -> None:
        self.steps.append(step)
        self.paths.append(path)

    def add(self, op: FusedOp) -> None:
        """Append the step of an operation."""
        match op.kind:
            case "adder":
                adder_weight, sums = self._adder(op)
                source, target, factors = self._connect(op, sums)
                self._append(Adder(source, target, adder_weight, op.window, op.groups, factors), op.path)
            case "convolution":
                weight, sums = self._convolution(op)
                source, target, factors = self._connect(op, sums)
                self._append(Convolution(source, target, weight, op.window, op.groups, factors), op.path)
            case "average_pool":
                source, target, factors = self._connect(op, self._byte_sums(op))
                self._append(AveragePool(source, target, op.window, factors), op.path)
            case "rescale":
                self._append(Rescale(*self._connect(op, self._byte_sums(op))), op.path)
            case "max_pool":
                source, target = self.numbers[op.input], self._output(op)
                self._append(MaxPool(source, target, op.window), op.path)
            case "linear":
                self._append(self._linear(op), op.path)
            case _:
                assert_never(op.kind)

    def _connect(self, op: FusedOp, sums: _Sums) -> tuple[int, int, Requantization]:
        """Return the numbers of the activations that a step reads and writes, and its requantization."""
        factors = self._requantization(sums.affine, self._grid(op.output), op.residual, sums.largest)
        return self.numbers[op.input], self._output(op), factors

    def _output(self, op: FusedOp) -> int:
        self.numbers[op.output] = self._activation(op.output, self._grid(op.output))
        return self.numbers[op.output]

    def _byte_sums(self, op: FusedOp) -> _Sums:
        """Return the sums of a step without weights: those of the bytes of a window, or the byte itself."""
        grid, taps = self._grid(op.input), math.prod(op.window.kernel)
        zero_point = (grid.zero_point * torch.exp2(grid.scale_exponent)).double()
        affine = _Affine(torch.full_like(zero_point, grid.scale / taps), -grid.scale * zero_point)
        affine = self._round_gain(op, self._normalize(op, affine))
        return _Sums(affine, torch.full_like(zero_point, 255 * taps))

    def _weight_and_bias(self, op: FusedOp) -> tuple[Tensor, Tensor]:
        """Return a layer's weight in fp32, as ``window_weight`` does, and its bias ``[O]`` fp64."""
        layer = self.model.get_submodule(op.path)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = window_weight(layer, op).detach().cpu().float()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
        return weight, bias.double()

    def _adder(self, op: FusedOp) -> tuple[Tensor, _Sums]:
        """Return the bytes of an adder layer's weight, in the shape of the plan, and its sums."""
        grid, (weight, bias) = self._grid(op.input), self._weight_and_bias(op)
        nearest, excess = grid.weights(weight, op.groups)
        shape = (op.groups, 1, -1, *([1] * (weight.ndim - 2)))
        rows = nearest.unflatten(0, (op.groups, -1))
        codes = (rows / grid.step_size.view(shape) + grid.zero_point.view(shape)).round().clamp(0, grid.quant_max)
        stored = (codes * torch.exp2(grid.scale_exponent).view(shape)).flatten(0, 1).to(torch.uint8)
        values = terms_first(stored).flatten(2).double()  # [T, O, C / groups · kh · kw]
        factors = term_factors(len(values), values)
        unit = float(factors[-1])  # of the sums, in units of the input's bytes
        gain = torch.full((len(weight),), -grid.scale * unit, dtype=torch.float64)
        affine = self._round_gain(op, self._normalize(op, _Affine(gain, bias - excess.double())))
        largest = factors / unit @ torch.maximum(values, 255 - values).sum(2)
        return stored.movedim(1, -1).contiguous(), _Sums(affine, largest)

    def _convolution(self, op: FusedOp) -> tuple[Tensor, _Sums]:
        """Return the codes ``[O, kh, kw, C / groups]`` of a convolution's weight, and its sums."""
        grid, (weight, bias) = self._grid(op.input), self._weight_and_bias(op)
        zero_point = (grid.zero_point * torch.exp2(grid.scale_exponent)).double()
        codes, step_size = quantize_filters(self.model, op, weight)
        affine = self._normalize(op, _Affine(grid.scale * step_size.double(), bias))
        # Padded taps read the zero point too, so that its contribution is the same everywhere.
        rows = codes.unflatten(0, (op.groups, -1)).double()
        below = (rows * zero_point.view(op.groups, 1, -1, 1, 1)).sum((2, 3, 4)).flatten()
        affine = _Affine(affine.gain, affine.shift - affine.gain * below)
        largest = 255 * codes.flatten(1).abs().sum(1).double()
        return codes.to(torch.int8).permute(0, 2, 3, 1).contiguous(), _Sums(affine, largest)

    def _normalize(self, op: FusedOp, affine: _Affine) -> _Affine:
        for path in op.norms:
            gain, shift = affine_of(self.model.get_submodule(path))
            affine = affine.then(gain, shift)
        return affine

    def _round_gain(self, op: FusedOp, affine: _Affine) -> _Affine:
        """Round the gain to the nearest one that a shift can give, as ``compute_op`` does; the mean stays the same."""
        if not op.norms or not self.model.needs_shift(op):
            return affine
        norm = self.model.get_submodule(op.norms[-1])
        assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        step_size = self._grid(op.output).step_size.double()
        rounded = _nearest_power(affine.gain / step_size) * step_size
        ratio = torch.where(affine.gain == 0, torch.ones_like(rounded), rounded / affine.gain)
        bias = norm.bias.detach().cpu().double() if norm.affine else torch.zeros_like(rounded)
        return _Affine(rounded, (affine.shift - bias) * ratio + bias)

    def _requantization(self, affine: _Affine, grid: Grid, residual: int | None, largest: Tensor) -> Requantization:
        step_size = grid.step_size.double()
        factor, offset = affine.gain / step_size, affine.shift / step_size + grid.zero_point.double() + 0.5
        number = None if residual is None else self.numbers[residual]
        other = None
        if number is not None:
            added = self.activations[number]
            other = added.scale / step_size
            other = _nearest_power(other) if self.shifts else other
            offset = offset - added.scale / step_size * added.zero_point.double()
        bits, (multiplier, residual_multiplier) = self._fixed(factor, other, offset, largest)
        return Requantization(
            multiplier=multiplier,
            offset=(offset * torch.exp2(bits)).round().long(),
            shift=bits.to(torch.uint8),
            scale_exponent=grid.scale_exponent.to(torch.uint8),
            quant_max=grid.quant_max,
            residual=number,
            residual_multiplier=residual_multiplier if number is not None else None,
        )

    def _fixed(
        self, factor: Tensor, other: Tensor | None, offset: Tensor, largest: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the shift of each channel, and its factors as integers with as many bits as int32 and int64 hold."""
        factor = _nearest_power(factor) if self.shifts else factor
        second = torch.zeros_like(factor) if other is None else other
        most = torch.maximum(factor.abs(), second.abs()).clamp_min(2.0**-31)
        total = largest * factor.abs() + 255 * second.abs() + offset.abs() + 1
        bits = torch.minimum((_LARGEST / most).log2().floor(), _TOTAL_BITS - total.log2().ceil())
        bits = bits.clamp(0, _LARGEST_SHIFT)
        first, last = ((each * torch.exp2(bits)).round().clamp(-_LARGEST, _LARGEST) for each in (factor, second))
        return bits, (first.to(torch.int32), last.to(torch.int32))

    def _linear(self, op: FusedOp) -> Linear:
        weight, sums = self._convolution(op)
        affine = sums.affine
        reach = float((sums.largest * affine.gain.abs() + affine.shift.abs()).max())
        scale = 2.0 ** math.ceil(math.log2(max(reach, 1e-30)) - _LOGIT_BITS)
        factor, offset = affine.gain / scale, affine.shift / scale + 0.5
        bits, (multiplier, _) = self._fixed(factor, None, offset, sums.largest)
        whole = (offset * torch.exp2(bits)).round().long()
        return Linear(self.numbers[op.input], weight.flatten(1), multiplier, whole, bits.to(torch.uint8), scale)


def _nearest_power(values: Tensor) -> Tensor:
    """Return the nearest power of two by ratio with the same sign; 0 stays 0."""
    sizes = values.abs()
    powers = torch.exp2(torch.where(sizes > 0, sizes, torch.ones_like(sizes)).log2().round())
    return torch.where(sizes > 0, torch.sign(values) * powers, values)
