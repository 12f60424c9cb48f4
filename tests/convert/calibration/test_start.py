"""The start of a fit: slopes of terms, and how they are placed."""

import itertools

import pytest
import torch

from adderkit.convert.calibration.start import place_terms, slope_table


@pytest.fixture
def windows():
    """Two groups with two channels of two taps: after a ReLU, and of both signs."""
    torch.manual_seed(0)
    values = torch.randn(2, 500, 4, dtype=torch.float64)
    values[..., :2].relu_()
    return values


def test_lines_are_placed_at_the_ends_of_the_range(windows):
    table = slope_table(windows, 2)
    channels = windows.unflatten(2, (2, 2)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    assert torch.equal(table.weight[:, 0], channels.amin(1))
    assert torch.equal(table.weight[:, -1], channels.amax(1))
    assert bool((table.weight.diff(dim=1) >= 0).all())
    assert table.error[:, (0, -1)].max().item() < 1e-9


def error(values, weights, slope):
    """Share of the variance of x by which the terms of a weight miss ``slope · x``, up to a constant."""
    terms = torch.stack([-(2.0**-index) * (values - weight).abs() for index, weight in enumerate(weights)])
    return (terms.sum(0) - slope * values).var(correction=0).item() / values.var(correction=0).item()


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_no_other_place_is_better(windows, terms):
    """Against every choice of a term inside the range, in a hundred steps, and of ends for the others."""
    slopes = torch.linspace(-2, 2, 2 * 4, dtype=torch.float64).reshape(1, 2, 4).repeat(2, 1, 1)
    placed = place_terms(slope_table(windows, 2), slopes, terms, 2)
    assert placed.shape == (2, 2, terms, 4)
    for group, filter, tap in itertools.product(range(2), range(2), range(4)):
        channel = tap // 2
        values = windows[group, :, 2 * channel : 2 * channel + 2].flatten()
        candidates = torch.linspace(values.min(), values.max(), 100).tolist()
        slope = slopes[group, filter, tap].item()
        best = min(
            error(values, [*others[:inside], weight, *others[inside:]], slope)
            for inside in range(terms)
            for others in itertools.product((candidates[0], candidates[-1]), repeat=terms - 1)
            for weight in candidates
        )
        assert error(values, placed[group, filter, :, tap].tolist(), slope) < best + 0.002


def test_slopes_of_whole_bits_need_no_term_inside(windows):
    """Two terms together have the slopes 1.5, 0.5, -0.5 and -1.5."""
    slopes = torch.tensor([1.5, 0.5, -0.5, -1.5], dtype=torch.float64).reshape(1, 4, 1).repeat(2, 1, 4)
    table = slope_table(windows, 2)
    placed = place_terms(table, slopes, 2, 2)
    for channel in range(2):
        low, high = table.weight[channel, 0], table.weight[channel, -1]
        expected = torch.stack([torch.stack(pair) for pair in ((high, high), (high, low), (low, high), (low, low))])
        torch.testing.assert_close(placed[0, :, :, 2 * channel], expected)


def test_slopes_out_of_reach_get_the_closest(windows):
    slopes = torch.full((2, 1, 4), 5.0, dtype=torch.float64)
    table = slope_table(windows, 2)
    placed = place_terms(table, slopes, 2, 2)
    highest = table.weight[:, -1].reshape(2, 1, 1, 2).repeat_interleave(2, -1).expand_as(placed)
    torch.testing.assert_close(placed, highest)
