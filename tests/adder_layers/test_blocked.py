"""The blocked loops: how the work is cut must not show in the result, nor in the memory."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from adderkit.adder_layers import blocked
from adderkit.adder_layers.conv import adder_conv2d
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.reference import adder_conv2d_reference

MEGABYTE = 1 << 20


def window_of(weight, options):
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    return Window.of(weight, *(options.get(name, default) for name, default in defaults.items()))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_half_precision_is_computed_in_fp32(dtype, expected):
    assert blocked.compute_dtype(dtype) == expected


@pytest.mark.parametrize(
    ("block_elements", "patch_elements"),
    [(1, 1), (40, 1 << 22), (1 << 20, 150), (100, 400)],
    ids=["single-terms", "small-blocks", "small-tiles", "small-both"],
)
def test_cutting_does_not_change_the_result(
    monkeypatch, case, operands, results, assert_close, block_elements, patch_elements
):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(blocked, "PATCH_ELEMENTS", patch_elements)
    tensors = operands(case)
    actual = results(adder_conv2d, *tensors, **case.options)
    expected = results(adder_conv2d_reference, *tensors, **case.options)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference)


@pytest.mark.parametrize("patch_elements", [1, 150, 1 << 22])
def test_forward_writes_every_output(monkeypatch, case, operands, assert_close, patch_elements):
    monkeypatch.setattr(blocked, "PATCH_ELEMENTS", patch_elements)
    input, weight, _ = operands(case)
    expected = adder_conv2d_reference(input, weight, **case.options)
    output = torch.full_like(expected, torch.nan)
    blocked.forward(input, weight, output, window_of(weight, case.options), case.options.get("groups", 1))
    assert_close(output, expected)


def test_input_grad_adds_to_result(case, operands, assert_close):
    input, weight, _ = operands(case)
    leaf = input.clone().requires_grad_()
    output = adder_conv2d_reference(leaf, weight, **case.options)
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, leaf, grad)
    result = torch.zeros_like(input)
    window = window_of(weight, case.options)
    blocked.input_grad(grad, input, weight, result, window, case.options.get("groups", 1))
    assert_close(result, expected)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    groups=st.integers(1, 4),
    positions=st.integers(1, 9),
    outs=st.integers(1, 6),
    taps=st.integers(1, 12),
    limit=st.integers(1, 400),
)
def test_blocks_cover_every_difference_once_and_stay_below_the_limit(groups, positions, outs, taps, limit):
    patches, filters = torch.zeros(groups, positions, taps), torch.zeros(groups, outs, taps)
    seen = torch.zeros(groups, positions, outs, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK_ELEMENTS", limit)
        for group, position, out in blocked._blocks(patches, filters):
            box = seen[group, position, out]
            assert box.numel() == 1 or 1 < box.numel() * taps <= limit
            box += 1
    assert torch.equal(seen, torch.ones_like(seen))


def peak_bytes(function, path):
    """The result of ``function``, and the most bytes beside it that torch held at once, from a profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert peak >= result.nbytes, "the profile missed the result itself"
    return result, peak - result.nbytes


# Unfolded in one piece, each of these layers takes more than 300 MB (measured by raising PATCH_ELEMENTS).
LARGE = {
    "7x7-of-512-channels": ((1, 512, 56, 56), (1, 512, 7, 7), {"padding": 3}),
    "depthwise-5x5-on-batch": ((4, 96, 64, 64), (96, 1, 5, 5), {"padding": 2, "groups": 96}),
}


@pytest.mark.parametrize(("input_shape", "weight_shape", "options"), LARGE.values(), ids=LARGE.keys())
def test_extra_memory_stays_below_256_megabytes(tmp_path, input_shape, weight_shape, options):
    input, weight = torch.randn(input_shape, requires_grad=True), torch.randn(weight_shape)
    trace = tmp_path / "trace.json"
    output, extra = peak_bytes(lambda: adder_conv2d(input, weight, **options), trace)
    assert extra < 256 * MEGABYTE

    grad = torch.ones_like(output)
    _, extra = peak_bytes(lambda: torch.autograd.grad(output, input, grad)[0], trace)
    assert extra < 256 * MEGABYTE
