"""Bad arguments of the function: each is named with its value and what was expected."""

import re

import pytest
import torch

from adderkit.adder_layers.conv import adder_conv2d

# Changes to good arguments (tensors by their shapes), and the message: argument, value, what was expected.
BAD = {
    "input-rank-2": ({"input": (5, 5)}, "input has shape (5, 5), expected [N, C, H, W]"),
    "input-rank-5": ({"input": (1, 1, 4, 5, 5)}, "input has shape (1, 1, 4, 5, 5), expected [N, C, H, W]"),
    "input-rank-1-same": (
        {"input": (5,), "weight": (6, 2, 2, 2), "padding": "same"},
        "input has shape (5,), expected [N, C, H, W]",
    ),
    "input-rank-2-same": (
        {"input": (5, 5), "weight": (6, 2, 2, 2), "padding": "same"},
        "input has shape (5, 5), expected [N, C, H, W]",
    ),
    "weight-rank-3": ({"weight": (6, 2, 3)}, "weight has shape (6, 2, 3), expected non-empty [O, C / groups"),
    "weight-rank-3-same": (
        {"weight": (6, 2, 3), "padding": "same"},
        "weight has shape (6, 2, 3), expected non-empty [O, C / groups",
    ),
    "weight-empty": ({"weight": (0, 2, 3, 3)}, "weight has shape (0, 2, 3, 3), expected non-empty"),
    "wrong-channels": ({"input": (1, 5, 5, 5)}, "input has 5 channels (shape (1, 5, 5, 5)), expected 4"),
    "groups-not-dividing": ({"groups": 4}, "groups is 4, expected a divisor of the 6 filters"),
    "groups-0": ({"groups": 0}, "groups is 0, expected a divisor of the 6 filters"),
    "bias-length": ({"bias": (5,)}, "bias has shape (5,), expected [6]"),
    "bias-rank": ({"bias": (6, 1)}, "bias has shape (6, 1), expected [6]"),
    "stride-0": ({"stride": 0}, "stride is (0, 0), expected at least 1"),
    "stride-0-columns": ({"stride": (1, 0)}, "stride is (1, 0), expected at least 1"),
    "padding-negative": ({"padding": -1}, "padding is (-1, -1), expected at least 0"),
    "dilation-0": ({"dilation": 0}, "dilation is (0, 0), expected at least 1"),
    "dilation-negative-same": (
        {"dilation": -1, "padding": "same"},
        "dilation is (-1, -1), expected at least 1",
    ),
    "stride-of-3": ({"stride": (1, 2, 3)}, "stride is (1, 2, 3), expected one number"),
    "padding-of-3": ({"padding": (1, 2, 3)}, "padding is (1, 2, 3), expected one number"),
    "dilation-of-3": ({"dilation": (1, 2, 3)}, "dilation is (1, 2, 3), expected one number"),
    "stride-of-3-same": (
        {"stride": (1, 1, 1), "padding": "same"},
        "stride is (1, 1, 1), expected one number",
    ),
    "dilation-of-3-same": (
        {"dilation": (1, 1, 1), "padding": "same"},
        "dilation is (1, 1, 1), expected one number",
    ),
    "padding-unknown": ({"padding": "full"}, "padding is 'full', expected 'same', 'valid' or numbers"),
    "stride-2-same": ({"stride": 2, "padding": "same"}, "stride is (2, 2), expected 1 with padding='same'"),
    "kernel-above-input": (
        {"weight": (6, 2, 7, 3)},
        "input of 5x5 pixels is smaller than the kernel: expected",
    ),
    "dilated-kernel-above-input": (
        {"dilation": 3},
        "input of 5x5 pixels is smaller than the kernel: expected",
    ),
}


def bad_arguments(changes):
    arguments = {"input": (1, 4, 5, 5), "weight": (6, 2, 3, 3), "bias": (6,), "groups": 2, **changes}
    for name in ("input", "weight", "bias"):
        arguments[name] = torch.zeros(arguments[name])
    return arguments


def test_the_arguments_that_bad_ones_start_from_are_good():
    assert adder_conv2d(**bad_arguments({})).shape == (1, 6, 3, 3)


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named_with_value_and_expectation(changes, message):
    arguments = bad_arguments(changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        adder_conv2d(**arguments)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [1.5, (1.5, 1.5)], ids=["number", "pair"])
def test_fractions_of_a_pixel_are_refused(name, value):
    arguments = bad_arguments({name: value})
    with pytest.raises(TypeError, match=f"{name} is .*1.5.*expected"):
        adder_conv2d(**arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
def test_input_must_be_floating_point(dtype):
    input, weight = torch.ones(1, 2, 4, 4, dtype=dtype), torch.ones(3, 2, 3, 3, dtype=dtype)
    with pytest.raises(TypeError, match=f"input has dtype {dtype}, expected a floating-point"):
        adder_conv2d(input, weight)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_dtypes_must_agree(name):
    arguments = bad_arguments({})
    arguments[name] = arguments[name].double()
    with pytest.raises(TypeError, match=f"{name} has dtype torch.float64, expected torch.float32"):
        adder_conv2d(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_devices_must_agree(name):
    arguments = bad_arguments({})
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, expected cpu"):
        adder_conv2d(**arguments)
