"""Cost of an integer network for one image, step by step, and of the CNN of the same shape in the same integers.

Requantization multiplies each sum once, and each byte of a residual once; requantization by shifts multiplies nothing.
"""

import dataclasses
import math

from typing_extensions import assert_never

from ...adder_layers.integer.check import check_plan
from ...adder_layers.integer.network import IntegerNetwork
from ...adder_layers.integer.plan import (
    Adder,
    AveragePool,
    Convolution,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
    powers_of_two,
    requantization_of,
)
from .operations import Operations
from .report import Cost, IntegerRow, LayerCost

_KINDS = {"max_pool": "pooling", "average_pool": "pooling", "rescale": "element-wise"}


def integer_cost(network: IntegerNetwork) -> Cost:
    """Count the operations and bytes of an integer network."""
    plan = network.plan
    bits = _code_bits(plan)
    rows = [_row(step, path, plan, bits[step.input]) for step, path in zip(plan.steps, plan.paths, strict=True)]
    first = plan.activations[0]
    shape = (first.channels, first.height, first.width)
    if network.stem is not None:
        stem = network.stem
        size = first.height * first.width
        count = Operations(products=size * stem.weight.numel(), sums=0)
        rows.insert(0, _float_row("stem", "convolution", shape, count, stem.weight.numel(), stem.out_channels))
        # The plan reads the stem's output; the image has the stem's input channels and, by its stride, more pixels.
        shape = (stem.in_channels, first.height * stem.stride[0], first.width * stem.stride[1])
    if network.head is not None:
        head = network.head
        count = Operations(products=head.weight.numel())
        rows.append(_float_row("head", "linear", (head.out_features,), count, head.weight.numel(), head.out_features))
    parameters = sum(row.parameters for row in rows)
    return Cost(tuple(rows), parameters, shape, integers=tuple(integer_rows(plan)))


def integer_rows(plan: IntegerPlan) -> list[IntegerRow]:
    """Return the bits and ranges of what each step writes."""
    rows = []
    for step, path, reach in zip(plan.steps, plan.paths, check_plan(plan), strict=True):
        sum_bits = max(abs(reach.least), reach.largest).bit_length()
        if isinstance(step, Linear):
            rows.append(IntegerRow(path, step.kind, 32, 1, sum_bits, None, None))
            continue
        written, factors = plan.activations[step.output], requantization_of(step)
        zero_point = written.zero_point.double() * written.scale
        top = 255.0 if factors is None else (factors.quant_max << factors.scale_exponent.long()).double()
        low, high = float(-zero_point.max()), float((top * written.scale - zero_point).max())
        groups = 1 if factors is None else len(factors.scale_exponent.unique())
        bits = 8 if factors is None else factors.quant_max.bit_length()
        rows.append(IntegerRow(path, step.kind, bits, groups, sum_bits, low, high))
    return rows


def _code_bits(plan: IntegerPlan) -> dict[int, int]:
    """Return the bits of the codes of each activation, by its number."""
    bits = {0: 8}
    for step in plan.steps:
        if not isinstance(step, Linear):
            factors = requantization_of(step)
            bits[step.output] = bits[step.input] if factors is None else factors.quant_max.bit_length()
    return bits


def _row(step: Step, path: str, plan: IntegerPlan, bits: int) -> LayerCost:
    source = plan.activations[step.input]
    if isinstance(step, Linear):
        shape: tuple[int, ...] = (len(step.offset),)
    else:
        written = plan.activations[step.output]
        shape = (written.channels, written.height, written.width)
    size = math.prod(shape)
    weights, products, taps = 0, 0, 1
    terms = step.terms if isinstance(step, Adder) else 1
    match step:
        case Adder() | Convolution() | Linear():
            weights = step.weight.numel()
            products = size * weights // len(step.weight) // terms
        case MaxPool() | AveragePool():
            taps = math.prod(step.window.kernel)
        case Rescale():
            pass
        case _:
            assert_never(step)
    factors = step if isinstance(step, Linear) else requantization_of(step)
    added = int(isinstance(factors, Requantization) and factors.residual is not None)
    scalings = 0 if factors is None else size * (1 + added)
    sums = size * (taps - 1) + (0 if factors is None else size * (1 + added))
    before = Operations(products=products, scalings=scalings, sums=sums)
    shifts = factors is not None and powers_of_two(step)
    after = dataclasses.replace(before, scalings=0, shifts=scalings) if shifts else before
    if isinstance(step, Adder):  # the sums of the terms are combined by doubling, which is wiring, and additions
        after = dataclasses.replace(after, products=0, distances=products * terms, sums=sums + size * (terms - 1))
    own = 0 if factors is None else 3 * len(factors.offset)
    return LayerCost(
        path=path,
        cls=type(step).__name__,
        kind=_KINDS.get(step.kind, step.kind),
        output_shape=shape,
        operations=after,
        before=before,
        parameters=weights + own,
        weights=weights,
        activations=source.channels * source.height * source.width + size * (1 + added),
        bits=bits,
        terms=terms,
    )


def _float_row(path: str, kind: str, shape: tuple[int, ...], count: Operations, weights: int, biases: int) -> LayerCost:
    size = math.prod(shape)
    return LayerCost(path, "float", kind, shape, count, count, weights + biases, weights, 2 * size)
