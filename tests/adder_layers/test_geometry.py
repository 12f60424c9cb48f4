"""Window sizes against ``F.conv2d``, and tiles against the windows that ``F.unfold`` cuts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adderkit.adder_layers.geometry import Window, pair, tiles


def pairs(least, most):
    return st.tuples(st.integers(least, most), st.integers(least, most))


windows = st.builds(Window, kernel=pairs(1, 5), stride=pairs(1, 4), padding=pairs(0, 7), dilation=pairs(1, 3))
sizes = pairs(1, 12)
quick = settings(max_examples=200, deadline=None, derandomize=True)


def test_pair_doubles_a_number_and_keeps_a_pair():
    assert pair(3) == (3, 3)
    assert pair([3, 4]) == (3, 4)
    assert pair(torch.Size((5, 6))) == (5, 6)


@pytest.mark.parametrize("value", [(1,), (1, 2, 3)], ids=str)
def test_pair_names_the_argument_it_refuses(value):
    with pytest.raises(ValueError, match=r"stride is \(1,.*expected one number or \(height, width\)"):
        pair(value, "stride")


def test_window_of_takes_the_kernel_from_the_weight():
    window = Window.of(torch.empty(8, 4, 3, 5), [2, 1], [0, 6], [1, 7])
    assert window == Window(kernel=(3, 5), stride=(2, 1), padding=(0, 6), dilation=(1, 7))


@quick
@given(window=windows, size=sizes)
def test_output_size_is_that_of_conv2d(window, size):
    input, weight = torch.empty(1, 1, *size, device="meta"), torch.empty(1, 1, *window.kernel, device="meta")
    output_size = window.output_size(*size)
    if min(output_size) < 1:
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            F.conv2d(input, weight, None, window.stride, window.padding, window.dilation)
    else:
        output = F.conv2d(input, weight, None, window.stride, window.padding, window.dilation)
        assert output.shape[2:] == output_size


@quick
@given(window=windows, size=sizes, batch=st.integers(0, 4), each=st.integers(1, 9), limit=st.integers(1, 600))
def test_tiles_cover_every_output_once_and_stay_below_the_limit(window, size, batch, each, limit):
    assume(min(window.output_size(*size)) >= 1)
    seen = torch.zeros(batch, *window.output_size(*size), dtype=torch.int64)
    for images, rows, columns in tiles(window, torch.empty(batch, 2, *size), each, limit):
        box = seen[images, rows.first : rows.last, columns.first : columns.last]
        assert box.numel() == 1 or 1 < box.numel() * each <= limit
        assert images.stop <= batch
        box += 1
    assert torch.equal(seen, torch.ones_like(seen))


@quick
@given(window=windows, size=sizes, limit=st.integers(1, 300))
def test_spans_hold_the_windows_that_unfold_cuts(window, size, limit):
    assume(min(window.output_size(*size)) >= 1)
    kernel, stride, padding, dilation = window
    # Numbered from 1, so that a zero can only come from padding.
    input = torch.arange(1.0, size[0] * size[1] + 1).reshape(1, 1, *size)
    whole = F.unfold(input, kernel, dilation, padding, stride).reshape(-1, *window.output_size(*size))
    for _, rows, columns in tiles(window, input, 1, limit):
        crop = input[:, :, rows.start : rows.stop, columns.start : columns.stop]
        crop = F.pad(crop, (columns.before, columns.after, rows.before, rows.after))
        expected = whole[:, rows.first : rows.last, columns.first : columns.last]
        assert torch.equal(F.unfold(crop, kernel, dilation, 0, stride).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("limit", "count", "box"),
    [
        (10**6, 1, (4, 6, 5)),
        (2 * 6 * 5, 2, (2, 6, 5)),
        (3 * 5, 8, (1, 3, 5)),
        (2, 72, (1, 1, 2)),
        (1, 120, (1, 1, 1)),
    ],
    ids=["whole", "split-images", "split-rows", "split-columns", "single-positions"],
)
def test_tiles_split_images_then_rows_then_columns(limit, count, box):
    window = Window(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
    found = list(tiles(window, torch.empty(4, 1, 6, 5), 1, limit))
    images, rows, columns = found[0]
    assert len(found) == count
    assert (images.stop, rows.last, columns.last) == box
