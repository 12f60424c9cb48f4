"""The C++ kernels, every instruction set that this machine has, against the reference."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adderkit.adder_layers.backends import cpu
from adderkit.adder_layers.conv import adder_conv2d
from adderkit.adder_layers.reference import adder_conv2d_reference

SETS = cpu.available()
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.fixture(params=SETS)
def forced(request, monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, request.param)
    return request.param


def test_the_extension_was_built():
    assert "baseline" in SETS, "the C++ extension is missing; look at what the installation said of CMake"


def test_forced_set_is_the_one_in_use(forced):
    assert cpu.instruction_set() == forced


def test_plain_torch_can_be_forced(monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    assert cpu.instruction_set() is None


def test_unknown_set_is_refused(monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, "avx1024")
    with pytest.raises(ValueError, match=r"ADDERKIT_CPU is 'avx1024', expected one of .*baseline, torch"):
        adder_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_case_in_every_layout(case, dtype, memory_format, forced, operands, results, assert_close):
    input, weight, bias = operands(case, dtype)
    input = input.contiguous(memory_format=memory_format)
    actual = results(adder_conv2d, input, weight, bias, **case.options)
    wide = (input.float(), weight.float(), bias.float())
    expected = results(adder_conv2d_reference, *wide, **case.options)
    for name, got, wanted in zip(("output", "input", "weight", "bias"), actual, expected, strict=True):
        assert got.dtype == dtype, name
        assert_close(got, wanted)


@pytest.mark.parametrize("filters", [1, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("channels", [1, 3, 8, 11])
def test_tails_of_filters_and_channels(filters, channels, forced, results, assert_close):
    input, weight = torch.randn(3, channels, 13, 17), torch.randn(filters, channels, 3, 3)
    actual = results(adder_conv2d, input, weight, padding=1)
    expected = results(adder_conv2d_reference, input, weight, padding=1)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("channels", [255, 256, 257, 513, 1100])
def test_long_sums_are_as_exact_as_short_ones(channels, forced):
    """Sums are settled every 256 terms; errors of one long sum would grow with its length."""
    input, weight = torch.randn(2, channels, 5, 6), torch.randn(9, channels, 1, 1)
    expected = adder_conv2d_reference(input.double(), weight.double())
    error = (adder_conv2d(input, weight).double() - expected).abs() / expected.abs()
    assert error.max() < 1e-6


@pytest.mark.parametrize("offset", [0.0, 3.3, -1000.1])
def test_equal_operands_are_exactly_no_distance_apart(offset, forced):
    """The sums of maxima, inputs and weights are rounded alike, so they cancel."""
    filter = torch.randn(1, 300, 1, 1) + offset
    output = adder_conv2d(filter.expand(2, -1, 4, 5), filter.expand(7, -1, -1, -1))
    assert torch.equal(output, torch.zeros(2, 7, 4, 5))


def test_never_positive(forced):
    """Nearly equal operands leave rounding alone, and that must not turn a distance negative."""
    filter = torch.randn(1, 700, 1, 1) * 100
    input = filter * (1 + 1e-7 * torch.randn(4, 700, 6, 6))
    assert (adder_conv2d(input, filter.expand(16, -1, -1, -1)) <= 0).all()


sizes = st.integers(1, 3)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(1, 40),
    groups=sizes,
    channels=sizes,
    filters=sizes,
    height=st.integers(5, 12),
    width=st.integers(5, 19),
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_any_window(images, groups, channels, filters, height, width, kernel, stride, padding, dilation):
    input = torch.randn(images, groups * channels, height, width, requires_grad=True)
    weight = torch.randn(groups * filters, channels, *kernel, requires_grad=True)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    actual, expected = (f(input, weight, **options) for f in (adder_conv2d, adder_conv2d_reference))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(expected)
    for got, wanted in zip(*(torch.autograd.grad(y, (input, weight), grad) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_every_output_is_written(forced):
    """Fresh memory may hold anything: a second call, into memory that held NaN, gives the same bits."""
    input, weight = torch.randn(2, 5, 9, 9), torch.randn(7, 5, 3, 3)
    expected = adder_conv2d(input, weight, padding=1)
    window = cpu.Window.of(weight, (1, 1), (1, 1), (1, 1))
    poisoned = torch.full_like(expected, float("nan"))
    cpu.forward(input, weight[None], poisoned, window, 1)
    assert torch.equal(poisoned, expected)


def test_not_a_number_comes_through(forced):
    input, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    input[0, 0, 2, 2] = float("nan")
    leaf = input.requires_grad_()
    output = adder_conv2d(leaf, weight)
    output.nansum().backward()
    assert output[0, 0, 1, 1].isnan()
    assert leaf.grad[0, 0, 2, 2].isnan()


THREADED = {
    "3x3": ((4, 8, 20, 20), (9, 8, 3, 3), {"padding": 1}),
    "one-image-of-many-channels": ((1, 300, 4, 4), (70, 300, 3, 3), {"padding": 1}),
    "1x1": ((3, 64, 8, 8), (64, 64, 1, 1), {}),
    "groups-stride": ((5, 16, 15, 14), (24, 4, 3, 3), {"groups": 4, "stride": 2}),
    "depthwise": ((4, 32, 14, 14), (32, 1, 3, 3), {"groups": 32, "padding": 1}),
}


@pytest.mark.parametrize("name", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_threads_do_not_change_the_bits(name, dtype, memory_format, forced, results):
    """More threads than cores, too. The weight's gradient is torch's and may differ."""
    input_shape, weight_shape, options = THREADED[name]
    tensors = torch.randn(input_shape).to(dtype, memory_format=memory_format), torch.randn(weight_shape).to(dtype)
    output, input_grad, _ = results(adder_conv2d, *tensors, **options)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        again, grad_again, _ = results(adder_conv2d, *tensors, **options)
        assert torch.equal(again, output)
        assert torch.equal(grad_again, input_grad)


def test_no_buffer_of_unfolded_windows():
    """Peak memory of a process that convolves a large image stays far below what unfolding it would take."""
    script = """
import resource, torch, adderkit
x, w = torch.zeros(1, 64, 224, 224), torch.zeros(4, 64, 7, 7)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
adderkit.adder_conv2d(x, w, padding=3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64  # MiB; unfolded, the image would be 600


SETTINGS = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "threads": 1}
INPUT, WEIGHT, OUTPUT = torch.zeros(2, 4, 5, 6), torch.zeros(1, 3, 4, 3, 3), torch.zeros(2, 3, 3, 4)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ((INPUT.double(), WEIGHT, OUTPUT), TypeError),
        ((INPUT[0], WEIGHT, OUTPUT), TypeError),
        ((INPUT, WEIGHT[0], OUTPUT), TypeError),
        ((INPUT, WEIGHT.transpose(3, 4), OUTPUT), TypeError),
        ((INPUT, WEIGHT, OUTPUT.half()), TypeError),
        ((INPUT, WEIGHT.to("meta"), OUTPUT), TypeError),
        ((INPUT, WEIGHT[:, :, :3].contiguous(), OUTPUT), ValueError),
        ((INPUT, WEIGHT, OUTPUT[:, :, 1:]), ValueError),
        ((INPUT, WEIGHT, OUTPUT[:1]), ValueError),
    ],
    ids=[
        "dtype",
        "rank",
        "weight-without-terms",
        "not-contiguous",
        "output-dtype",
        "device",
        "channels",
        "output-size",
        "batch",
    ],
)
def test_the_extension_refuses_tensors_that_do_not_fit(tensors, error):
    with pytest.raises(error):
        cpu._cpu.forward("baseline", *tensors, **SETTINGS)


def test_the_extension_refuses_a_result_of_another_layout():
    result = torch.empty_like(INPUT, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="shape and strides"):
        cpu._cpu.input_grad("baseline", OUTPUT, INPUT, WEIGHT, result, **SETTINGS)


def test_the_extension_refuses_an_image_spread_over_more_memory_than_there_is():
    input, weight, output = torch.zeros(1, 9, 2, 2), torch.zeros(1, 1, 9, 2, 2), torch.zeros(1, 1, 2, 2)
    spread = {"padding": (2**29, 2**29), "dilation": (2**30, 2**30)}
    with pytest.raises(ValueError, match="more memory than any machine has"):
        cpu._cpu.forward("baseline", input, weight, output, **SETTINGS | spread)


@pytest.mark.parametrize("changes", [{"stride": (0, 1)}, {"padding": (-1, 0)}, {"groups": 3}, {"dilation": (1, 2)}])
def test_the_extension_refuses_settings_that_do_not_fit(changes):
    with pytest.raises(ValueError, match=r"must be positive|fit together|shape of this convolution"):
        cpu._cpu.forward("baseline", INPUT, WEIGHT, OUTPUT, **SETTINGS | changes)
