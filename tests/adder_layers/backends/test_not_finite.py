"""NaN, infinities and huge numbers come out where, and as what, the formula has them."""

import pytest
import torch

from adderkit.adder_layers.backends import cpu
from adderkit.adder_layers.conv import adder_conv2d
from adderkit.adder_layers.reference import adder_conv2d_reference

INF, NAN = float("inf"), float("nan")
CASES = {
    "1x1": ((2, 5, 4, 5), (6, 5, 1, 1), {}),
    "padding": ((2, 3, 5, 4), (9, 3, 3, 3), {"padding": 2}),
    # Neither the last row and column nor, for the kernel of 1x2, most of the other pixels belong to a window.
    "stride": ((2, 3, 6, 8), (5, 3, 3, 3), {"stride": 2}),
    "gaps": ((1, 2, 8, 8), (3, 2, 1, 2), {"stride": 3}),
    "depthwise": ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": 1}),
    "dilation": ((1, 4, 7, 7), (6, 2, 3, 3), {"groups": 2, "dilation": 2, "padding": 1}),
}
# Values for a corner and a pixel in the middle of the input, and for two taps of the weight.
VALUES = {
    "inf-input": ((INF, 0.5), (0.5, 0.5)),
    "both-infinities-in-the-input": ((INF, -INF), (0.5, 0.5)),
    "inf-weight": ((0.5, 0.5), (INF, 0.5)),
    "inf-in-both": ((INF, -INF), (INF, -INF)),
    "nan-input": ((NAN, 0.5), (0.5, 0.5)),
    "nan-weight": ((0.5, 0.5), (0.5, NAN)),
    "nan-and-inf": ((NAN, INF), (-INF, NAN)),
    "huge-and-equal": ((3e38, 3e38), (3e38, 3e38)),
    "huge-and-opposite": ((3e38, -3e38), (-3e38, 3e38)),
    "sums-that-overflow": ((-2e38, -2e38), (-1e38, -1e38)),
}


@pytest.fixture(params=[*cpu.available(), "torch"])
def _forced(request, monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, request.param)


def draw(name, values, dtype):
    input_shape, weight_shape, options = CASES[name]
    input, weight = torch.randn(input_shape), torch.randn(weight_shape)
    input[0, 0, -1, -1], input[-1, 1, 1, 2] = values[0]
    weight[0, 0, -1, -1], weight[-1, 0, 0, 0] = values[1]
    return input.to(dtype), weight.to(dtype), options


def assert_like(actual, expected):
    """Infinities and NaN in the same places, and the rest close."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, equal_nan=True, check_dtype=False)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_fp32(name, values, memory_format):
    input, weight, options = draw(name, values, torch.float32)
    input = input.contiguous(memory_format=memory_format).requires_grad_()
    output = adder_conv2d(input, weight, **options)
    expected = adder_conv2d_reference(input, weight, **options)
    assert_like(output, expected)
    slopes = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    slopes[0, 0, 0, 0] = 0
    actual, wanted = (torch.autograd.grad(result, input, slopes)[0] for result in (output, expected))
    assert_like(actual, wanted)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["1x1", "padding"])
@pytest.mark.parametrize("values", ["inf-in-both", "nan-and-inf"])
def test_other_dtypes(name, values, dtype):
    input, weight, options = draw(name, VALUES[values], dtype)
    wide = [tensor.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for tensor in (input, weight)]
    output = adder_conv2d(input.requires_grad_(), weight, **options)
    expected = adder_conv2d_reference(*wide, **options)
    assert_like(output, expected.to(dtype))
    actual, wanted = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((output, input), (expected, wide[0])))
    assert_like(actual, wanted.to(dtype))


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("values", ["inf-input", "both-infinities-in-the-input", "nan-input", "nan-weight"])
def test_weight_gradient(name, values):
    input, weight, options = draw(name, VALUES[values], torch.float32)
    weight.requires_grad_()
    output, expected = (f(input, weight, **options) for f in (adder_conv2d, adder_conv2d_reference))
    slopes = torch.linspace(0.5, 1, output.numel()).reshape(output.shape)
    actual, wanted = (torch.autograd.grad(result, weight, slopes)[0] for result in (output, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("slope", [INF, -INF, NAN])
def test_gradients_that_are_not_finite(slope):
    """As loss scaling meets them; HardTanh is 0 in one place, where they become NaN."""
    input, weight, options = draw("padding", VALUES["nan-input"], torch.float32)
    input.nan_to_num_()
    input[0, 0, 2, 2] = weight[0, 0, 1, 1]
    slopes = torch.randn(2, 9, 7, 6)
    slopes[0, 0, 3, 3] = slope
    leaf = input.requires_grad_()
    results = (f(leaf, weight, **options) for f in (adder_conv2d, adder_conv2d_reference))
    actual, wanted = (torch.autograd.grad(result, leaf, slopes)[0] for result in results)
    assert_like(actual, wanted)
