"""From a model that imitates integers to the plan that has them: everything affine folded into the requantization.

Behind the sum ``a`` of a layer stand its bias, the constants of clamped weights, zero points and BatchNorm, all of them
affine in ``a``: ``v = gain · a + shift``. In units of the output's step that is a multiplier and an offset for each
channel, in the plan's form ``(a · multiplier + offset) >> shift``.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

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
from .fake_quantize import FakeQuantized, filters_of
from .fusion import Stage
from .grids import Grid

_LARGEST = 2**31 - 1
_TOTAL_BITS = 61  # totals stay below 2^62, which check_plan asks for
_LOGIT_BITS = 30
_LARGEST_SHIFT = 62


@dataclasses.dataclass(frozen=True)
class _Affine:
    """``gain · x + shift`` for each channel, ``[C]`` fp64."""

    gain: Tensor
    shift: Tensor

    def then(self, gain: Tensor, shift: Tensor) -> "_Affine":
        return _Affine(self.gain * gain, self.shift * gain + shift)


@torch.no_grad()
def fold(model: FakeQuantized) -> IntegerPlan:
    """Write the plan of a model whose grids are set and whose BatchNorm statistics are measured.

    The plan begins behind the first layer, and ends before the classifier, where these stay in fp32.

    Raises:
        AdderkitError: The plan could overflow.
    """
    builder = _Builder(model)
    stages = model._stages.stages
    body = [stage for stage in stages if not builder.in_float(stage)]
    for stage in body:
        builder.add(stage)
    plan = IntegerPlan(tuple(builder.activations), tuple(builder.steps), tuple(builder.paths))
    try:
        check_plan(plan)
    except ValueError as error:
        raise AdderkitError(f"the quantized network would not be sound: {error}") from error
    return plan


class _Builder:
    """Numbers activations anew, and appends a step for each stage."""

    def __init__(self, model: FakeQuantized) -> None:
        self.model = model
        self.shifts = model._quantize_config.requant == "shift"
        self.activations: list[Activation] = []
        self.steps: list[Step] = []
        self.paths: list[str] = []
        self.numbers: dict[int, int] = {}
        self.grids: dict[int, Grid] = {}
        first = next((stage.output for stage in model._stages.stages if self.in_float(stage)), 0)
        self._begin(first if model.grid(0) is None else 0)

    def in_float(self, stage: Stage) -> bool:
        """Whether a stage stays outside of the plan."""
        return self.model.grid(stage.input) is None or (
            stage.kind == "linear" and self.model._quantize_config.first_last == "fp32"
        )

    def _begin(self, number: int) -> None:
        """The activation that the plan reads: in 8 bits, and brought to its own grid where that has fewer."""
        grid = self._grid(number)
        if grid.levels == 255 or number == 0:
            self.numbers[number] = self._activation(number, grid)
            return
        whole = Grid(grid.scale, grid.zero * torch.exp2(grid.exponent), torch.zeros_like(grid.exponent), 255)
        source = self._activation(number, whole)
        self.numbers[number] = self._activation(number, grid)
        affine = _Affine(torch.full_like(grid.step.double(), grid.scale), grid.low.double())
        factors = self._requantization(affine, grid, None, torch.full_like(affine.gain, 255))
        self._append(Rescale(source, self.numbers[number], factors), "input")

    def _grid(self, number: int) -> Grid:
        grid = self.model.grid(number)
        assert grid is not None
        return Grid(grid.scale, grid.zero.cpu(), grid.exponent.cpu(), grid.levels)

    def _activation(self, number: int, grid: Grid) -> int:
        zero = (grid.zero * torch.exp2(grid.exponent)).round().clamp(0, 255).to(torch.uint8)
        self.activations.append(Activation(*self.model._stages.shapes[number], grid.scale, zero))
        return len(self.activations) - 1

    def _append(self, step: Step, path: str) -> None:
        self.steps.append(step)
        self.paths.append(path)

    def add(self, stage: Stage) -> None:
        """Append the step of a stage."""
        source = self.numbers[stage.input]
        if stage.kind == "linear":
            self._append(self._linear(stage, source), stage.path)
            return
        grid = self._grid(stage.output)
        if stage.kind == "max_pool":
            target = self.numbers[stage.output] = self._activation(stage.output, grid)
            self._append(MaxPool(source, target, stage.window), stage.path)
            return
        weight, affine, largest = self._sums(stage)
        factors = self._requantization(affine, grid, stage.residual, largest)
        target = self.numbers[stage.output] = self._activation(stage.output, grid)
        if weight is not None and stage.kind == "adder":
            step: Step = Adder(source, target, weight, stage.window, stage.groups, factors)
        elif weight is not None:
            step = Convolution(source, target, weight, stage.window, stage.groups, factors)
        elif stage.kind == "average_pool":
            step = AveragePool(source, target, stage.window, factors)
        else:
            step = Rescale(source, target, factors)
        self._append(step, stage.path)

    def _sums(self, stage: Stage) -> tuple[Tensor | None, _Affine, Tensor]:
        """A stage's weight, what its result is of its sums, and how large these can be."""
        grid = self._grid(stage.input)
        zero = (grid.zero * torch.exp2(grid.exponent)).double()
        if stage.kind in ("rescale", "average_pool"):
            taps = math.prod(stage.window.kernel)
            affine = self._normalized(stage, _Affine(torch.full_like(zero, grid.scale / taps), -grid.scale * zero))
            return None, self._shiftable(stage, affine), torch.full_like(zero, 255 * taps)
        layer = self.model.get_submodule(stage.path)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        weight = layer.weight.detach().cpu().float().reshape(len(layer.weight), -1, *stage.window.kernel)
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
        if stage.kind == "adder":
            return self._adder(stage, grid, weight, bias.double())
        return self._convolution(stage, grid, zero, weight, bias.double())

    def _adder(self, stage: Stage, grid: Grid, weight: Tensor, bias: Tensor) -> tuple[Tensor, _Affine, Tensor]:
        nearest, excess = grid.weights(weight, stage.groups)
        shape = (stage.groups, 1, -1, 1, 1)
        rows = nearest.unflatten(0, (stage.groups, -1))
        codes = (rows / grid.step.view(shape) + grid.zero.view(shape)).round().clamp(0, grid.levels)
        stored = (codes * torch.exp2(grid.exponent).view(shape)).flatten(0, 1).to(torch.uint8).permute(0, 2, 3, 1)
        gain = torch.full((len(weight),), -grid.scale, dtype=torch.float64)
        affine = self._shiftable(stage, self._normalized(stage, _Affine(gain, bias - excess.double())))
        values = stored.flatten(1).double()
        return stored.contiguous(), affine, torch.maximum(values, 255 - values).sum(1)

    def _shiftable(self, stage: Stage, affine: _Affine) -> _Affine:
        """The nearest gain that a shift can give; the mean stays BatchNorm's, as in ``fake_quantize``."""
        if not stage.norms or not self.model.shifts(stage):
            return affine
        norm = self.model.get_submodule(stage.norms[-1])
        assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        step = self._grid(stage.output).step.double()
        rounded = _nearest_power(affine.gain / step) * step
        ratio = torch.where(affine.gain == 0, torch.ones_like(rounded), rounded / affine.gain)
        bias = norm.bias.detach().cpu().double() if norm.affine else torch.zeros_like(rounded)
        return _Affine(rounded, (affine.shift - bias) * ratio + bias)

    def _convolution(
        self, stage: Stage, grid: Grid, zero: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, _Affine, Tensor]:
        codes, step = filters_of(self.model, stage, weight)
        affine = self._normalized(stage, _Affine(grid.scale * step.double(), bias))
        # Padded taps read the zero point too, so that its part is the same everywhere.
        rows = codes.unflatten(0, (stage.groups, -1)).double()
        below = (rows * zero.view(stage.groups, 1, -1, 1, 1)).sum((2, 3, 4)).flatten()
        affine = _Affine(affine.gain, affine.shift - affine.gain * below)
        largest = 255 * codes.flatten(1).abs().sum(1).double()
        return codes.to(torch.int8).permute(0, 2, 3, 1).contiguous(), affine, largest

    def _normalized(self, stage: Stage, affine: _Affine) -> _Affine:
        for path in stage.norms:
            gain, shift = affine_of(self.model.get_submodule(path))
            affine = affine.then(gain, shift)
        return affine

    def _requantization(self, affine: _Affine, grid: Grid, residual: int | None, largest: Tensor) -> Requantization:
        step = grid.step.double()
        factor, offset = affine.gain / step, affine.shift / step + grid.zero.double() + 0.5
        number = None if residual is None else self.numbers[residual]
        other = None
        if number is not None:
            added = self.activations[number]
            other = added.scale / step
            other = _nearest_power(other) if self.shifts else other
            offset = offset - added.scale / step * added.zero.double()
        bits, (multiplier, residual_multiplier) = self._fixed(factor, other, offset, largest)
        return Requantization(
            multiplier=multiplier,
            offset=(offset * torch.exp2(bits)).round().long(),
            shift=bits.to(torch.uint8),
            exponent=grid.exponent.to(torch.uint8),
            levels=grid.levels,
            residual=number,
            residual_multiplier=residual_multiplier if number is not None else None,
        )

    def _fixed(
        self, factor: Tensor, other: Tensor | None, offset: Tensor, largest: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The shift of each channel, and its factors as whole numbers, with as many bits as int32 and int64 hold."""
        factor = _nearest_power(factor) if self.shifts else factor
        second = torch.zeros_like(factor) if other is None else other
        most = torch.maximum(factor.abs(), second.abs()).clamp_min(2.0**-31)
        total = largest * factor.abs() + 255 * second.abs() + offset.abs() + 1
        bits = torch.minimum((_LARGEST / most).log2().floor(), _TOTAL_BITS - total.log2().ceil())
        bits = bits.clamp(0, _LARGEST_SHIFT)
        first, last = ((each * torch.exp2(bits)).round().clamp(-_LARGEST, _LARGEST) for each in (factor, second))
        return bits, (first.to(torch.int32), last.to(torch.int32))

    def _linear(self, stage: Stage, source: int) -> Linear:
        weight, affine, largest = self._sums(stage)
        assert weight is not None
        reach = float((largest * affine.gain.abs() + affine.shift.abs()).max())
        scale = 2.0 ** math.ceil(math.log2(max(reach, 1e-30)) - _LOGIT_BITS)
        factor, offset = affine.gain / scale, affine.shift / scale + 0.5
        bits, (multiplier, _) = self._fixed(factor, None, offset, largest)
        whole = (offset * torch.exp2(bits)).round().long()
        return Linear(source, weight.flatten(1), multiplier, whole, bits.to(torch.uint8), scale)


def _nearest_power(values: Tensor) -> Tensor:
    """The nearest power of two by ratio, sign kept; 0 stays 0."""
    sizes = values.abs()
    powers = torch.exp2(torch.where(sizes > 0, sizes, torch.ones_like(sizes)).log2().round())
    return torch.where(sizes > 0, torch.sign(values) * powers, values)
