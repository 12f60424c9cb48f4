"""Bad arguments of the function and of the operators: each is named with its value and what was expected."""

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
    "stride-of-64-bits": ({"stride": 2**63}, f"stride is ({2**63}, {2**63}), expected at most {2**31 - 1}"),
    "padding-of-63-bits": ({"padding": 2**62}, f"padding is ({2**62}, {2**62}), expected at most {2**31 - 1}"),
    "dilation-of-32-bits": ({"dilation": (1, 2**31)}, f"dilation is (1, {2**31}), expected at most {2**31 - 1}"),
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
        operate(arguments)
    with pytest.raises(TypeError, match=f"{name} has dtype torch.float64, expected torch.float32"):
        adder_conv2d(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_devices_must_agree(name):
    arguments = bad_arguments({})
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, expected cpu"):
        adder_conv2d(**arguments)


def operate(arguments, device="cpu"):
    """Call the operator as an exported program does, which has resolved single numbers and defaults."""
    tensors = [arguments[name].to(device) for name in ("input", "weight", "bias")]
    settings = [arguments.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    pairs = [[value, value] if isinstance(value, int) else list(value) for value in settings]
    return torch.ops.adderkit.adder_conv2d(*tensors, *pairs, arguments["groups"])


# The dispatcher itself refuses numbers of more than 63 bits, and strings.
FOR_OPERATORS = {
    name: bad for name, bad in BAD.items() if not isinstance(bad[0].get("padding"), str) and "64-bits" not in name
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changes", "message"), FOR_OPERATORS.values(), ids=FOR_OPERATORS.keys())
def test_the_operator_and_its_fake_refuse_what_the_function_refuses(changes, message, device):
    with pytest.raises(ValueError, match=re.escape(message)):
        operate(bad_arguments(changes), device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_operator_takes_good_arguments(device):
    assert operate(bad_arguments({}), device).shape == (1, 6, 3, 3)


BAD_GRADS = {
    "rows": ({"grad": (1, 6, 2, 3)}, "grad has shape (1, 6, 2, 3), expected (1, 6, 3, 3), like the output"),
    "filters": ({"grad": (1, 5, 3, 3)}, "grad has shape (1, 5, 3, 3), expected (1, 6, 3, 3)"),
    "images": ({"grad": (2, 6, 3, 3)}, "grad has shape (2, 6, 3, 3), expected (1, 6, 3, 3)"),
    "rank": ({"grad": (6, 3, 3)}, "grad has shape (6, 3, 3), expected (1, 6, 3, 3)"),
    "weight": ({"weight": (6, 3, 3, 3)}, "input has 4 channels (shape (1, 4, 5, 5)), expected 6"),
    "groups": ({"groups": 4}, "groups is 4, expected a divisor of the 6 filters"),
    "stride": ({"stride": [0, 1]}, "stride is (0, 1), expected at least 1"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("changes", "message"), BAD_GRADS.values(), ids=BAD_GRADS.keys())
def test_the_input_gradient_operator_refuses_what_does_not_fit(changes, message, device):
    good = {"grad": (1, 6, 3, 3), "input": (1, 4, 5, 5), "weight": (6, 2, 3, 3), "stride": [1, 1], "groups": 2}
    arguments = good | changes
    tensors = [torch.zeros(arguments[name], device=device) for name in ("grad", "input", "weight")]
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.ops.adderkit.adder_conv2d_input_grad(*tensors, arguments["stride"], [0, 0], [1, 1], arguments["groups"])


def test_the_input_gradient_operator_refuses_another_dtype():
    grad, input, weight = (torch.zeros(shape) for shape in ((1, 6, 3, 3), (1, 4, 5, 5), (6, 4, 3, 3)))
    with pytest.raises(TypeError, match=r"grad has dtype torch.float64, expected torch.float32"):
        torch.ops.adderkit.adder_conv2d_input_grad(grad.double(), input, weight, [1, 1], [0, 0], [1, 1], 1)


def test_sparse_tensors_are_refused():
    arguments = bad_arguments({})
    with pytest.raises(ValueError, match=r"weight has layout torch.sparse_coo, expected a dense tensor"):
        adder_conv2d(**arguments | {"weight": arguments["weight"].to_sparse()})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool], ids=str)
def test_dtypes_that_cannot_hold_a_distance_are_refused(dtype):
    tensors = (torch.zeros(1, 2, 4, 4).to(dtype), torch.zeros(3, 2, 3, 3).to(dtype))
    with pytest.raises(TypeError, match=f"input has dtype {dtype}, expected a floating-point"):
        torch.ops.adderkit.adder_conv2d(*tensors, None, [1, 1], [0, 0], [1, 1], 1)
