"""Choose the range of each activation, by percentiles and a search, to minimize the error of the layers that read it.

The operations are visited in order. Each gets the input that it has in the quantized network so far, and its BatchNorm
is measured on that. Then the grid of its result is chosen among candidates by the error that they cause in the outputs
of the layers that read it, with their weights on that grid too. A BatchNorm follows those outputs, so the error is what
it cannot undo: the share of a channel's variance that a linear function of the quantized output does not explain.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import updating_statistics
from ..errors import AdderkitError
from ..graph.modes import eval_mode
from .fake_quantize import ActivationGrid, FakeQuantized, compute_op, compute_sums
from .fused_ops import WEIGHT_KINDS, FusedGraph, FusedOp
from .grids import Grid, grid_for

PERCENTILES = (1.0, 0.9999, 0.9997, 0.999, 0.997, 0.99, 0.98)
_SHARES = tuple(0.25 + 0.05 * index for index in range(16))  # of the largest value, for the error search
_SAMPLES = 1 << 15  # values of a channel from which percentiles are taken
_JUDGES = 32  # images on which candidates are compared
_READERS = 2  # layers that compare them
_TOLERANCE = 0.01  # of the largest logit: differences that another order of operations may cause


@dataclasses.dataclass(frozen=True)
class Range:
    """The range that was chosen for an activation.

    Args:
        path: Layer that writes it; empty for the image.
        bits: Bits of a code.
        rule: Rule that gave it: ``percentile 0.999`` or ``error``.
        low: Smallest value that a code stands for.
        high: Largest value that a code stands for.
        error: Share of variance, from 0 to 1, that quantization costs the layers that read the activation.
    """

    path: str
    bits: int
    rule: str
    low: float
    high: float
    error: float


class _Pair(NamedTuple):
    """An activation ``[N, C, H, W]`` in the original network and in the quantized one."""

    exact: Tensor
    rounded: Tensor


@torch.no_grad()
def set_ranges_(model: FakeQuantized, original: nn.Module, images: Tensor) -> list[Range]:
    """Choose the grids of a model's activations, in place; its BatchNorm statistics become those of the images.

    Args:
        model: A model that ``fake_quantize_`` changed.
        original: The same network before the change.
        images: ``[N, C, H, W]``, all held in memory together with their activations.

    Returns:
        A range for each activation that has its own grid.

    Raises:
        AdderkitError: The fused operations of the model do not compute what its forward pass does.
    """
    found: list[Range] = []

    def visit(op: FusedOp, values: Mapping[int, _Pair]) -> _Pair:
        rounded = {number: values[number].rounded for number in op.reads}
        exact = compute_op(original, op, {number: values[number].exact for number in op.reads})
        result = compute_op(model, op, rounded)
        if str(op.output) in model.quantization:
            found.append(_choose(model, original, op.output, op, result, exact))
            if model.needs_shift(op):  # with the gain that this grid allows
                result = compute_op(model, op, rounded)
        return _Pair(exact, model.quantize(op.output, result))

    image = images
    if "0" in model.quantization:
        found.append(_choose(model, original, 0, None, images, images))
        image = model.quantize(0, images)
    with eval_mode(model, original), updating_statistics(model) as norms:
        for norm in norms:
            norm.momentum = 1.0  # the statistics of this one batch
        _check_logits(original, images, model.fused_graph.run(_Pair(images, image), visit).exact)
    return found


def _check_logits(original: nn.Module, images: Tensor, found: Tensor) -> None:
    """Reject a model that was cut wrongly: tracing sees neither values nor tensors that change under two names."""
    expected = original(images)
    if expected.numel() != found.numel() or float((found.view_as(expected) - expected).abs().max()) > (
        _TOLERANCE * float(expected.abs().max())
    ):
        raise AdderkitError(
            f"{type(original).__name__} cannot be quantized: the operations that torch.fx finds give other logits than "
            "its forward pass; write that without operations in place and control flow on values"
        )


def images_that_fit(graph: FusedGraph, memory: int) -> int:
    """Return for how many images ``set_ranges_`` can hold the activations in a number of bytes."""
    largest = sorted((4 * math.prod(shape) for shape in graph.shapes), reverse=True)
    return max(1, memory // (3 * sum(largest[:4])))


def _choose(
    model: FakeQuantized, original: nn.Module, number: int, op: FusedOp | None, values: Tensor, exact: Tensor
) -> Range:
    """Set the grid of one activation.

    Args:
        model: The quantized network.
        original: The network before quantization.
        number: Number of the activation.
        op: The operation that writes it; ``None`` for the image.
        values: Its values ``[N, C, H, W]`` in the quantized network, before rounding.
        exact: Its values in the original network.
    """
    held = model.quantization[str(number)]
    assert isinstance(held, ActivationGrid)
    bits = held.quant_max.bit_length()
    judged = slice(0, _JUDGES)
    readers = [
        (reader, pools)
        for reader, pools in _readers(model.fused_graph, number)
        if model.weight_grid(reader) is not None
    ]
    wanted = [
        compute_sums(original, reader, _pooled(original, pools, exact[judged]), None) for reader, pools in readers
    ]
    best: tuple[float, str, Grid] | None = None
    for rule, grid in _candidates(model, op, values, exact, bits):
        nearest = grid.nearest(values[judged], (-1, 1, 1))
        errors = [
            _unexplained(compute_sums(model, reader, _pooled(model, pools, nearest), grid), target)
            for (reader, pools), target in zip(readers, wanted, strict=True)
        ]
        error = sum(errors) / len(errors) if errors else _unexplained(nearest, exact[judged])
        if best is None or error < best[0]:
            best = error, rule, grid
    assert best is not None
    error, rule, grid = best
    held.set_(grid)
    return Range(op.path if op else "", bits, rule, float(grid.low.min()), float(grid.high.max()), error)


def _readers(
    graph: FusedGraph, number: int, pools: tuple[FusedOp, ...] = ()
) -> list[tuple[FusedOp, tuple[FusedOp, ...]]]:
    """Return the first layers that read an activation, each with the max-pooling in between."""
    found = []
    for op in graph.ops:
        if op.kind == "max_pool" and op.input == number:
            found += _readers(graph, op.output, (*pools, op))
        elif op.kind in WEIGHT_KINDS and op.input == number:
            found.append((op, pools))
    return found[:_READERS]


def _pooled(model: nn.Module, pools: tuple[FusedOp, ...], values: Tensor) -> Tensor:
    for pool in pools:
        values = compute_sums(model, pool, values, None)
    return values


def _candidates(
    model: FakeQuantized, op: FusedOp | None, values: Tensor, exact: Tensor, bits: int
) -> Iterator[tuple[str, Grid]]:
    """Yield a grid for each percentile, and the one of least squared error of the activation itself."""
    unit, ceiling = None, math.inf if op is None else op.high
    if model.quantize_config.requant == "shift":
        pooled = op is not None and op.kind == "average_pool"
        unit = 1 / math.prod(op.window.kernel) if op is not None and pooled else 1.0
    rows = values.transpose(0, 1).flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // _SAMPLES)].sort(1).values  # [C, n]

    def grid(low: Tensor, high: Tensor) -> Grid:
        return grid_for(low.clamp_max(0), high.clamp_min(0), bits, ceiling=ceiling, unit=unit)

    for share in PERCENTILES if op is not None else (1.0,):
        last = rows.shape[1] - 1
        yield f"percentile {share:g}", grid(rows[:, round((1 - share) * last)], rows[:, round(share * last)])
    if op is None:
        return
    errors = [
        (float((each.nearest(values[:_JUDGES], (-1, 1, 1)) - exact[:_JUDGES]).square().mean()), index, each)
        for index, each in enumerate(grid(share * rows[:, 0], share * rows[:, -1]) for share in _SHARES)
    ]
    yield "error", min(errors)[2]


def _unexplained(values: Tensor, target: Tensor) -> float:
    """Return the share of the target's variance that a linear function of the values leaves, averaged over channels."""
    rows, wanted = (each.transpose(0, 1).flatten(1).double() for each in (values, target))
    rows, wanted = (each - each.mean(1, keepdim=True) for each in (rows, wanted))
    power = rows.square().sum(1) * wanted.square().sum(1)
    alive = power > 0
    if not bool(alive.any()):
        return 0.0
    correlation = (rows * wanted).sum(1)[alive].square() / power[alive]
    return float(1 - correlation.mean())
