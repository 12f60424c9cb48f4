"""The reference implementation, compared with loops in plain Python and with PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F

from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.plan import Adder, Convolution, Requantization
from adderkit.adder_layers.reference import adder_conv2d_reference
from tests.adder_layers.integer.random_plans import LAYERS, Builder, residual_network, single, square


def identity(filters: int) -> Requantization:
    """Brings sums below 256 through unchanged."""
    zeros = torch.zeros(filters, dtype=torch.uint8)
    return Requantization(torch.ones(filters, dtype=torch.int32), torch.zeros(filters).long(), zeros, zeros)


def requantize_in_python(total: int, factors: Requantization, channel: int) -> int:
    """The formula of `plan.py` in unbounded integers; `//` of a power of two is the shift."""
    code = max(total, 0) // 2 ** int(factors.shift[channel])
    return min(code, factors.quant_max) * 2 ** int(factors.scale_exponent[channel])


def layer_in_python(builder: Builder) -> list[int]:
    """The last step of `builder`'s plan on its image, byte by byte."""
    plan, image = builder.plan(), builder.image(1)
    step = plan.steps[-1]
    source, target = plan.activations[step.input], plan.activations[step.output]
    factors, residual = step.requantization, None
    if factors.residual is not None:
        residual = reference.run(type(plan)(plan.activations, plan.steps[:-1], plan.paths[:-1]), image)
    (rows, columns), (down, right), (top, left), (row_gap, column_gap) = step.window
    per_group, filters = source.channels // step.groups, target.channels // step.groups
    adds, terms = isinstance(step, Adder), 1 if step.weight.ndim == 4 else step.weight.shape[1]
    powers = [2**exponent for exponent in reversed(range(terms))]  # in units of the last term
    w = step.weight.reshape(target.channels, terms, rows, columns, per_group).tolist()
    x, result = image[0].tolist(), []
    for y in range(target.height):
        for z in range(target.width):
            for o in range(target.channels):
                total = 0
                for i in range(rows):
                    for j in range(columns):
                        for c in range(per_group):
                            channel = o // filters * per_group + c
                            v, u = y * down - top + i * row_gap, z * right - left + j * column_gap
                            inside = 0 <= v < source.height and 0 <= u < source.width
                            value = x[v][u][channel] if inside else int(source.zero_point[channel])
                            weights = [term[i][j][c] for term in w[o]]
                            for factor, weight in zip(powers, weights, strict=True):
                                total += factor * (abs(value - weight) if adds else value * weight)
                total = total * int(factors.multiplier[o]) + int(factors.offset[o])
                if residual is not None:
                    total += int(residual[0, y, z, o]) * int(factors.residual_multiplier[o])
                result.append(requantize_in_python(total, factors, o))
    return result


@pytest.mark.parametrize("cls", [Adder, Convolution])
@pytest.mark.parametrize(
    "name",
    [
        "5x3-asymmetric",
        "3x3-dilated",
        "groups-of-three",
        "four-bits",
        "residual-six-bits",
        "two-terms-pointwise",
        "three-terms-stride2",
        "three-terms-groups",
        "two-terms-doubling",
    ],
)
def test_layers_are_what_loops_in_python_give(name, cls):
    builder, again = single(cls, LAYERS[name]), single(cls, LAYERS[name])
    assert reference.run(builder.plan(), builder.image(1)).flatten().tolist() == layer_in_python(again)


@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_those_of_the_real_layers(name):
    """Integers below 2^53 are exact in fp64; the bytes' distance from `zero_point` is what is padded by 0."""
    layer = LAYERS[name]
    (stride, padding, dilation), groups = layer.window[1:], layer.groups
    for cls in (Adder, Convolution):
        builder = single(cls, layer)
        plan, image = builder.plan(), builder.image()
        step = plan.steps[-1]
        zero_point = plan.activations[step.input].zero_point.double()
        real = (image.double() - zero_point).permute(0, 3, 1, 2)
        weight = step.weight.double().movedim(-1, 1)
        if cls is Convolution:
            expected = F.conv2d(real, weight, None, stride, padding, dilation, groups)
            shift = zero_point.expand(len(image), *image.shape[1:]).permute(0, 3, 1, 2)
            constant = F.conv2d(
                F.pad(shift, (padding[1],) * 2 + (padding[0],) * 2, "replicate"),
                weight,
                None,
                stride,
                0,
                dilation,
                groups,
            )
            expected = expected + constant
        else:
            per_group = layer.channels // groups
            shift = (
                zero_point.reshape(groups, 1, per_group).expand(-1, layer.filters // groups, -1).reshape(-1, per_group)
            )
            shift = shift.reshape(*shift.shape, *([1] * (weight.ndim - 2)))
            last = -(2.0 ** (layer.terms - 1))
            expected = last * adder_conv2d_reference(real, weight - shift, None, stride, padding, dilation, groups)
        sums = reference.step_sums(step, image, plan.activations[step.input])
        assert torch.equal(sums.permute(0, 3, 1, 2).double(), expected), cls.kind


@pytest.mark.parametrize(
    ("window", "size", "ceil"),
    [
        (square(3, 2, 1), (12, 11), False),
        (square(3, 2, 1), (12, 11), True),
        (square(2, 2), (7, 5), True),
        (square(3, 1, 1, 2), (9, 8), False),
        (Window((2, 3), (2, 1), (0, 1), (1, 1)), (8, 6), False),
    ],
)
def test_max_pool_is_torchs(window, size, ceil):
    builder = Builder(5, *size)
    image = builder.image()
    values = image.permute(0, 3, 1, 2).double()
    expected = F.max_pool2d(values, *window, ceil_mode=ceil).permute(0, 2, 3, 1)
    builder.max_pool(window, tuple(expected.shape[1:3]))
    assert torch.equal(reference.run(builder.plan(), image).double(), expected)


@pytest.mark.parametrize(("kernel", "stride"), [((2, 2), (2, 2)), ((3, 2), (1, 2)), ((7, 6), (7, 6))])
def test_average_pool_is_torchs(kernel, stride):
    builder = Builder(6, 7, 6)
    image = builder.image()
    builder.average_pool(kernel, stride)
    plan = builder.plan()
    sums = reference.step_sums(plan.steps[0], image, plan.activations[0])
    expected = F.avg_pool2d(image.permute(0, 3, 1, 2).double(), kernel, stride) * math.prod(kernel)
    assert torch.equal(sums.double(), expected.permute(0, 2, 3, 1).round())


def test_requantization_at_its_edges():
    """Below zero, at it, at the last code and beyond; a negative multiplier; codes shifted into their group's step."""
    factors = Requantization(
        torch.tensor([1, -3, 2**31 - 1, -(2**31)], dtype=torch.int32),
        torch.tensor([-5, 100, 0, 2**61]),
        torch.tensor([0, 1, 31, 62], dtype=torch.uint8),
        torch.tensor([0, 2, 4, 4], dtype=torch.uint8),
        quant_max=15,
    )
    sums = torch.tensor([[0, 0, 0, 0], [5, 33, 1, 1], [6, 34, 2, -(2**30)], [25, -(2**31), 2**31 - 1, 2**30]])
    codes = reference.requantize(sums.reshape(2, 2, 1, 4), factors, {}).reshape(4, 4)
    expected = [
        [
            requantize_in_python(a * int(m) + int(b), factors, c)
            for c, (a, m, b) in enumerate(zip(row, factors.multiplier, factors.offset, strict=True))
        ]
        for row in sums.tolist()
    ]
    assert codes.tolist() == expected
    assert codes[:, 0].tolist() == [0, 0, 1, 15]


def test_the_classifier_in_python():
    builder = Builder(9, 1, 1)
    builder.linear(5)
    plan, image = builder.plan(), builder.image(3)
    step = plan.steps[0]
    expected = [
        [
            (sum(q * w for q, w in zip(x, row, strict=True)) * m + b) // 2**s
            for row, m, b, s in zip(
                *(t.tolist() for t in (step.weight, step.multiplier, step.offset, step.shift)), strict=True
            )
        ]
        for x in image.flatten(1).tolist()
    ]
    assert reference.run(plan, image).tolist() == expected
    assert reference.run(plan, image).dtype == torch.int32


def test_quantize_rounds_halves_up_and_saturates():
    zero_point = torch.tensor([0, 128], dtype=torch.uint8)
    images = torch.tensor([-100.0, -0.25, 0.0, 0.24, 0.25, 63.5, 1e9]).reshape(1, 1, 1, 7).repeat(1, 2, 1, 1)
    codes = reference.quantize(images, 0.5, zero_point)
    assert codes.shape == (1, 1, 7, 2)
    assert codes[..., 0].flatten().tolist() == [0, 0, 0, 0, 1, 127, 255]
    assert codes[..., 1].flatten().tolist() == [0, 128, 128, 128, 129, 255, 255]


def test_a_network_is_its_steps_one_after_the_other():
    builder = residual_network()
    plan, image = builder.plan(), builder.image(1)
    whole, values = reference.run(plan, image), {0: image}
    for step, path in zip(plan.steps[:-1], plan.paths, strict=False):
        values[step.output] = reference.run_step(step, plan.activations, values)
        size = plan.activations[step.output]
        assert values[step.output].shape == (1, size.height, size.width, size.channels), path
        assert values[step.output].unique().numel() > 8 or size.height == 1, f"{path} says nothing"
    assert torch.equal(reference.run_step(plan.steps[-1], plan.activations, values), whole)
    assert whole.unique().numel() > 5
