"""Fitting one adder layer: its distances, its aim, its bounds, and that it gets closer to the aim."""

import pytest
import torch

from adderkit.convert.calibration.reconstruction import (
    SCALES,
    best_start,
    correlation,
    distances,
    input_ranges,
    reconstruct,
)
from adderkit.convert.calibration.start import place_terms, slope_table


def problem(groups=2, samples=600, channels=3, taps=4, filters=5):
    """Windows that are never negative, as after a ReLU, and what a convolution makes of them."""
    windows = torch.randn(groups, samples, channels * taps).relu()
    weight = torch.randn(groups, filters, channels * taps) * 0.1
    return windows, windows @ weight.transpose(1, 2), weight


def seeded(value=0):
    return torch.Generator().manual_seed(value)


def by_loops(windows, weight):
    """Distances ``[G, S, O]`` of filters ``[G, O, T, K]``, term by term."""
    return -sum(
        2.0**-index * (windows[:, :, None] - term[:, None]).abs().sum(-1) for index, term in enumerate(weight.unbind(2))
    )


def score(windows, target, weight):
    """Mean over filters of torch's own correlation with the target."""
    output = by_loops(windows, weight)
    pairs = [
        torch.corrcoef(torch.stack((output[group, :, filter], target[group, :, filter])))[0, 1]
        for group in range(output.shape[0])
        for filter in range(output.shape[2])
    ]
    return float(torch.stack(pairs).mean())


@pytest.mark.parametrize("terms", [1, 3])
def test_distances_by_loops(terms):
    windows, weight = torch.randn(2, 6, 12), torch.randn(2, 5, terms, 12)
    torch.testing.assert_close(distances(windows, weight), by_loops(windows, weight))


@pytest.mark.parametrize("terms", [1, 3])
def test_distances_have_the_true_derivative(terms):
    windows = torch.randn(2, 6, 4, dtype=torch.float64)
    weight = torch.randn(2, 3, terms, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda filters: distances(windows, filters), (weight,))


def test_correlation_is_that_of_torch():
    first, second = torch.randn(2, 50, 3), torch.randn(2, 50, 3)
    second += first
    actual = correlation(first, second)
    for group in range(2):
        for channel in range(3):
            pair = torch.stack((first[group, :, channel], second[group, :, channel]))
            torch.testing.assert_close(actual[group, channel], torch.corrcoef(pair)[0, 1])


def test_correlation_of_a_channel_that_does_not_vary_is_zero():
    constant = torch.full((1, 50, 1), 3.0)
    assert correlation(constant, torch.randn(1, 50, 1)).item() == 0


def test_correlation_ignores_offset_and_scale():
    values = torch.randn(1, 50, 4)
    torch.testing.assert_close(correlation(values, 5 * values - 3), torch.ones(1, 4))
    torch.testing.assert_close(correlation(values, -values), -torch.ones(1, 4))


def test_input_ranges_are_those_of_the_channels():
    windows, taps = torch.randn(2, 50, 12), 4
    low, high = input_ranges(windows, taps)
    assert low.shape == high.shape == (2, 1, 12)
    for group in range(2):
        for column in range(12):
            first = column // taps * taps
            values = windows[group, :, first : first + taps]
            assert low[group, 0, column] == values.min()
            assert high[group, 0, column] == values.max()


def test_clamping_to_the_range_adds_a_constant_to_each_filter():
    windows, _, weight = problem()
    low, high = input_ranges(windows, 4)
    weight = 30 * weight
    clamped = weight.clamp(low, high)
    assert (clamped != weight).any()
    outer, inner = (distances(windows.double(), filters.double()[:, :, None]) for filters in (weight, clamped))
    difference = outer - inner
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_each_filter_gets_the_best_of_all_scales(groups, terms):
    windows, target, weight = problem(groups)
    start = best_start(windows, target, weight, 4, terms)
    table = slope_table(windows, 4)
    for group in range(groups):
        for output in range(weight.shape[1]):
            scores = []
            for scale in SCALES:
                slopes = weight / (scale * weight.std(2, keepdim=True))
                placed = by_loops(windows, place_terms(table, slopes, terms, 4))[group, :, output]
                scores.append(torch.corrcoef(torch.stack([placed, target[group, :, output]]))[0, 1].item())
            chosen = by_loops(windows, start)[group, :, output]
            actual = torch.corrcoef(torch.stack([chosen, target[group, :, output]]))[0, 1].item()
            assert actual == pytest.approx(max(scores), abs=1e-5)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_no_steps_only_start(terms):
    windows, target, weight = problem()
    start = best_start(windows, target, weight, 4, terms)
    assert start.shape == (2, 5, terms, 12)
    assert torch.equal(reconstruct(windows, target, weight, 4, 0, seeded(), terms), start)


def test_more_terms_follow_more_closely():
    windows, target, weight = problem(groups=1, filters=20)
    fitted = [reconstruct(windows, target, weight, 4, 40, seeded(), terms) for terms in (1, 2, 3)]
    scores = [score(windows, target, filters) for filters in fitted]
    assert scores == sorted(scores)
    assert 1 - scores[2] < (1 - scores[0]) / 4


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_fitting_raises_the_correlation(groups, terms):
    windows, target, weight = problem(groups)
    fitted = reconstruct(windows, target, weight, 4, 60, seeded(), terms)
    start = best_start(windows, target, weight, 4, terms)
    assert fitted.shape == start.shape
    assert score(windows, target, fitted) > score(windows, target, start) + 0.001


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_fitting_never_ends_much_below_the_start(steps):
    windows, target, weight = problem()
    fitted = reconstruct(windows, target, weight, 4, steps, seeded())
    assert score(windows, target, fitted) > score(windows, target, best_start(windows, target, weight, 4, 1)) - 0.01


def test_fitted_weights_lie_in_the_range_of_the_input():
    windows, target, weight = problem()
    low, high = (limit[:, :, None] for limit in input_ranges(windows, 4))
    fitted = reconstruct(windows, target, weight, 4, 10, seeded(), 2)
    assert bool(((fitted >= low) & (fitted <= high)).all())


def test_the_same_seed_gives_the_same_weights():
    windows, target, weight = problem(samples=3000)
    first = reconstruct(windows, target, weight, 4, 10, seeded(1))
    assert torch.equal(first, reconstruct(windows, target, weight, 4, 10, seeded(1)))
    assert not torch.equal(first, reconstruct(windows, target, weight, 4, 10, seeded(2)))


def test_arguments_are_not_changed():
    tensors = problem()
    before = [tensor.clone() for tensor in tensors]
    reconstruct(*tensors, 4, 5, seeded())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dead", ["windows", "target", "weight"])
def test_a_dead_layer_stays_finite(dead):
    tensors = dict(zip(("windows", "target", "weight"), problem(), strict=True))
    tensors[dead] = torch.zeros_like(tensors[dead])
    fitted = reconstruct(**tensors, taps=4, steps=5, generator=seeded())
    assert bool(fitted.isfinite().all())


def test_works_where_gradients_are_off():
    windows, target, weight = problem()
    expected = reconstruct(windows, target, weight, 4, 5, seeded())
    with torch.no_grad():
        assert torch.equal(reconstruct(windows, target, weight, 4, 5, seeded()), expected)
