"""The blocked loops: how the work is cut must not show in the result, nor in the memory."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from adderkit.adder_layers.backends import blocked
from adderkit.adder_layers.geometry import Window, terms_first
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


@pytest.fixture(
    params=[(1, 1), (40, 1 << 22), (1 << 20, 150), (100, 400), (1 << 20, 1 << 22)],
    ids=["single-terms", "small-blocks", "small-tiles", "small-both", "as-shipped"],
)
def _cut(request, monkeypatch):
    """Tiles and blocks small enough to split images, rows, columns, filters and groups."""
    block_elements, patch_elements = request.param
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(blocked, "PATCH_ELEMENTS", patch_elements)


@pytest.mark.usefixtures("_cut")
def test_forward_writes_the_reference_to_every_output(case, operands, assert_close):
    input, weight, _ = operands(case)
    expected = adder_conv2d_reference(input, weight, **case.options)
    output = torch.full_like(expected, torch.nan)
    blocked.forward(input, terms_first(weight), output, window_of(weight, case.options), case.options.get("groups", 1))
    assert_close(output, expected)


@pytest.mark.usefixtures("_cut")
def test_input_grad_overwrites_every_pixel_with_that_of_the_reference(case, operands, assert_close):
    input, weight, _ = operands(case)
    leaf = input.clone().requires_grad_()
    output = adder_conv2d_reference(leaf, weight, **case.options)
    grad = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, leaf, grad)
    result = torch.full_like(input, torch.nan)
    window = window_of(weight, case.options)
    blocked.input_grad(grad, input, terms_first(weight), result, window, case.options.get("groups", 1))
    assert_close(result, expected)


def test_input_grad_inside_autocast_stays_in_fp32():
    grad, input, weight = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    expected, actual = torch.zeros_like(input), torch.zeros_like(input)
    blocked.input_grad(grad, input, terms_first(weight), expected, window_of(weight, {}), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocked.input_grad(grad, input, terms_first(weight), actual, window_of(weight, {}), 1)
    assert torch.equal(actual, expected)


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
    """The most bytes that torch held at once while ``function`` ran, from the allocations in a profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(itertools.accumulate(changes))


# Unfolded in one piece, each of these layers takes more than 300 MB (measured by raising PATCH_ELEMENTS).
LARGE = {
    "7x7-of-512-channels": ((1, 512, 56, 56), (1, 512, 7, 7), {"padding": 3}),
    "depthwise-5x5-on-batch": ((4, 96, 64, 64), (96, 1, 5, 5), {"padding": 2, "groups": 96}),
}


@pytest.mark.parametrize(("input_shape", "weight_shape", "options"), LARGE.values(), ids=LARGE.keys())
def test_extra_memory_stays_below_256_megabytes(tmp_path, input_shape, weight_shape, options):
    input, weight = torch.randn(input_shape), torch.randn(weight_shape)
    window, groups = window_of(weight, options), options.get("groups", 1)
    output = torch.empty(F.conv2d(input.to("meta"), weight.to("meta"), **options).shape)
    result = torch.zeros_like(input)
    calls = {
        "forward": lambda: blocked.forward(input, terms_first(weight), output, window, groups),
        "input gradient": lambda: blocked.input_grad(output, input, terms_first(weight), result, window, groups),
    }
    peaks = {name: peak_bytes(call, tmp_path / "trace.json") for name, call in calls.items()}
    assert all(MEGABYTE < peak < 256 * MEGABYTE for peak in peaks.values()), peaks
