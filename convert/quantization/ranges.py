"""The range of each activation: percentiles and an error search, whichever costs the layers that read it least.

The stages are walked in order. Each gets what it really gets in the quantized network so far, and its BatchNorm is
measured on that; then the grid of its result is chosen among candidates by the error that they cause in the outputs of
the layers that read it, weights on that grid included. A BatchNorm follows those outputs, so the error is what it
cannot undo: the share of a channel's variance that a linear function of the quantized output does not explain.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import batch_norms
from ..errors import AdderkitError
from ..graph.modes import eval_mode
from .fake_quantize import ActivationGrid, FakeQuantized, carry_out, sums
from .fusion import WEIGHT_KINDS, Stage, Stages
from .grids import Grid, grid_for

PERCENTILES = (1.0, 0.9999, 0.9997, 0.999, 0.997, 0.99, 0.98)
_SHARES = tuple(0.25 + 0.05 * index for index in range(16))  # of the largest value, for the error search
_SAMPLES = 1 << 15  # values of a channel that percentiles are taken from
_JUDGES = 32  # images that candidates are compared on
_READERS = 2  # layers that compare them
_CUT = 0.01  # of the largest logit: what rounding may make of another order of operations


@dataclasses.dataclass(frozen=True)
class Range:
    """The range that an activation got.

    Args:
        path: Layer that writes it; empty for the image.
        bits: Of a code.
        rule: What chose it: ``percentile 0.999`` or ``error``.
        low: Least value; ``high`` the largest.
        high: See ``low``.
        error: Share of variance that quantization costs the layers that read it, from 0 to 1.
    """

    path: str
    bits: int
    rule: str
    low: float
    high: float
    error: float


@torch.no_grad()
def set_ranges_(model: FakeQuantized, original: nn.Module, images: Tensor) -> list[Range]:
    """Choose the grids of a model's activations, in place; its BatchNorm statistics become those of the images.

    Args:
        model: As ``fake_quantize_`` made it.
        original: The same network before that.
        images: ``[N, C, H, W]``, all of which are held with their activations.

    Returns:
        A range for each activation that has one of its own.

    Raises:
        AdderkitError: The stages that the model was cut into do not compute what it does.
    """
    stages, found = model._stages, []
    exact, rounded = {0: images}, {0: images}
    if "0" in model.quantization:
        found.append(_choose(model, original, 0, None, images, images))
        rounded[0] = model.quantize(0, images)
    last = {number: index for index, stage in enumerate(stages.stages) for number in stage.reads}
    with eval_mode(model, original):
        norms = batch_norms(model)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.training, norm.momentum = True, 1.0  # the statistics of this one batch
        try:
            for index, stage in enumerate(stages.stages):
                exact[stage.output] = carry_out(original, stage, exact)
                result = carry_out(model, stage, rounded)
                if str(stage.output) in model.quantization:
                    found.append(_choose(model, original, stage.output, stage, result, exact[stage.output]))
                    if model.shifts(stage):  # with the gain that this grid allows
                        result = carry_out(model, stage, rounded)
                rounded[stage.output] = model.quantize(stage.output, result)
                for number in stage.reads:
                    if last[number] == index:
                        exact.pop(number, None)
                        rounded.pop(number, None)
            _check_cut(original, images, exact[stages.stages[-1].output])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return found


def _check_cut(original: nn.Module, images: Tensor, found: Tensor) -> None:
    """Tracing sees neither values nor Python's names: what changes in place under two of them is cut wrongly."""
    expected = original(images)
    if expected.numel() != found.numel() or float((found.view_as(expected) - expected).abs().max()) > _CUT * float(
        expected.abs().max()
    ):
        raise AdderkitError(
            f"{type(original).__name__} cannot be quantized: cut into stages by torch.fx it gives other logits than by "
            "its forward; write its forward without operations in place and choices by values"
        )


def images_that_fit(stages: Stages, memory: int) -> int:
    """How many images' activations ``set_ranges_`` can hold in so many bytes."""
    largest = sorted((4 * math.prod(shape) for shape in stages.shapes), reverse=True)
    return max(1, memory // (3 * sum(largest[:4])))


def _choose(
    model: FakeQuantized, original: nn.Module, number: int, stage: Stage | None, values: Tensor, exact: Tensor
) -> Range:
    """Set the grid of one activation; ``values`` are what it receives, ``exact`` what it would without quantization."""
    held = model.quantization[str(number)]
    assert isinstance(held, ActivationGrid)
    stages, bits = model._stages, held.levels.bit_length()
    judged = slice(0, _JUDGES)
    readers = [(reader, pools) for reader, pools in _readers(stages, number) if model.weight_grid(reader) is not None]
    wanted = [sums(original, reader, _pooled(original, pools, exact[judged]), None) for reader, pools in readers]
    best: tuple[float, str, Grid] | None = None
    for rule, grid in _candidates(model, stage, values, exact, bits):
        nearest = grid.nearest(values[judged], (-1, 1, 1))
        errors = [
            _unexplained(sums(model, reader, _pooled(model, pools, nearest), grid), target)
            for (reader, pools), target in zip(readers, wanted, strict=True)
        ]
        error = sum(errors) / len(errors) if errors else _unexplained(nearest, exact[judged])
        if best is None or error < best[0]:
            best = error, rule, grid
    assert best is not None
    error, rule, grid = best
    held.set_(grid)
    return Range(stage.path if stage else "", bits, rule, float(grid.low.min()), float(grid.high.max()), error)


def _readers(stages: Stages, number: int, pools: tuple[Stage, ...] = ()) -> list[tuple[Stage, tuple[Stage, ...]]]:
    """The first layers that read an activation, each with the max-pools that lie between."""
    found = []
    for stage in stages.stages:
        if stage.kind == "max_pool" and stage.input == number:
            found += _readers(stages, stage.output, (*pools, stage))
        elif stage.kind in WEIGHT_KINDS and stage.input == number:
            found.append((stage, pools))
    return found[:_READERS]


def _pooled(model: nn.Module, pools: tuple[Stage, ...], values: Tensor) -> Tensor:
    for pool in pools:
        values = sums(model, pool, values, None)
    return values


def _candidates(
    model: FakeQuantized, stage: Stage | None, values: Tensor, exact: Tensor, bits: int
) -> Iterator[tuple[str, Grid]]:
    """Grids by each percentile, and the one of least squared error of the activation itself."""
    unit, ceiling = None, math.inf if stage is None else stage.high
    if model._quantize_config.requant == "shift":
        pooled = stage is not None and stage.kind == "average_pool"
        unit = 1 / math.prod(stage.window.kernel) if stage is not None and pooled else 1.0
    rows = values.transpose(0, 1).flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // _SAMPLES)].sort(1).values  # [C, n]

    def grid(low: Tensor, high: Tensor) -> Grid:
        return grid_for(low.clamp_max(0), high.clamp_min(0), bits, ceiling=ceiling, unit=unit)

    for share in PERCENTILES if stage is not None else (1.0,):
        last = rows.shape[1] - 1
        yield f"percentile {share:g}", grid(rows[:, round((1 - share) * last)], rows[:, round(share * last)])
    if stage is None:
        return
    errors = [
        (float((each.nearest(values[:_JUDGES], (-1, 1, 1)) - exact[:_JUDGES]).square().mean()), index, each)
        for index, each in enumerate(grid(share * rows[:, 0], share * rows[:, -1]) for share in _SHARES)
    ]
    yield "error", min(errors)[2]


def _unexplained(values: Tensor, target: Tensor) -> float:
    """Mean over channels of the share of the target's variance that a linear function of the values leaves."""
    rows, wanted = (each.transpose(0, 1).flatten(1).double() for each in (values, target))
    rows, wanted = (each - each.mean(1, keepdim=True) for each in (rows, wanted))
    power = rows.square().sum(1) * wanted.square().sum(1)
    alive = power > 0
    if not bool(alive.any()):
        return 0.0
    correlation = (rows * wanted).sum(1)[alive].square() / power[alive]
    return float(1 - correlation.mean())
