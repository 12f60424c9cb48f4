import math

import pytest
import torch
from torch import nn

from adderkit.convert.quantization.grids import Grid, channel_exponents, grid_for, signed_weights

FOUR_BITS = Grid(0.25, torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]), 15)


def test_values_a_code_stands_for():
    """By the formula scale * 2^scale_exponent * (code - zero_point)."""
    torch.testing.assert_close(FOUR_BITS.low, torch.tensor([0.0, -0.75]))
    torch.testing.assert_close(FOUR_BITS.high, torch.tensor([7.5, 3.0]))


def test_nearest_is_the_nearest_of_all_values():
    values = torch.randn(64, 2, 3, 1) * 6
    nearest = FOUR_BITS.nearest(values, (-1, 1, 1))
    for channel in range(2):
        codes = torch.arange(16) - FOUR_BITS.zero_point[channel]
        grid = codes * FOUR_BITS.step_size[channel]
        own = values[:, channel].flatten()
        closest = (own[:, None] - grid).abs().min(1).values
        torch.testing.assert_close((own - nearest[:, channel].flatten()).abs(), closest)


def test_half_goes_up():
    grid = Grid(1.0, torch.zeros(1), torch.zeros(1), 255)
    values = torch.tensor([0.5, 1.5, 2.5, -3.0, 254.5, 300.0]).view(1, 1, -1, 1)
    assert grid.nearest(values, (-1, 1, 1)).flatten().tolist() == [1, 2, 3, 0, 255, 255]


def test_gradient_passes_inside_and_stops_outside():
    grid = Grid(1.0, torch.zeros(1), torch.zeros(1), 15)
    values = torch.tensor([-2.0, 3.3, 20.0]).view(1, 1, -1, 1).requires_grad_()
    grid.nearest(values, (-1, 1, 1)).sum().backward()
    assert values.grad.flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("terms", [(), (3,)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_clamping_weights_costs_nothing(groups, terms):
    """For inputs on the grid, distances to clamped weights and the excess are distances to the weights themselves."""
    grid = Grid(0.5, torch.tensor([0.0, 2.0, 0.0, 7.0]), torch.tensor([0.0, 1.0, 2.0, 0.0]), 7)
    whole = torch.randint(-40, 40, (6, 4 // groups, *terms, 3, 3)).float()
    ones = [1] * len(terms)
    # On the grid's lattice, beyond its ends.
    rows = whole.unflatten(0, (groups, -1)) * grid.step_size.view(groups, 1, -1, *ones, 1, 1)
    weight = rows.flatten(0, 1)
    nearest, excess = grid.weights(weight, groups)
    codes = torch.randint(0, 8, (4, 3, 3)).float()
    patch = ((codes - grid.zero_point.view(-1, 1, 1)) * grid.step_size.view(-1, 1, 1)).unflatten(0, (groups, -1))
    patch = patch[:, None].expand(groups, 6 // groups, -1, 3, 3).flatten(0, 1)
    patch = patch.reshape(6, -1, *ones, 3, 3)
    factors = torch.tensor([1, 0.5, 0.25]).view(-1, 1, 1) if terms else 1.0
    expected, found = (((patch - each).abs() * factors).flatten(1).sum(1) for each in (weight, nearest))
    torch.testing.assert_close(found + excess, expected)
    assert bool((excess > 0).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("share", [0.7, 1.0, 1.3])
def test_weights_at_an_end_of_the_range_stay_there(bits, share):
    """So that the term stays a line: no value is rounded beyond a weight that is beyond the value."""
    values = torch.randn(2000, 3) * torch.tensor([0.3, 1.0, 4.0])
    low, high = values.amin(0), values.amax(0)
    grid = grid_for(share * low, share * high, bits)
    codes = grid.nearest(values[:, :, None, None], (-1, 1, 1))
    for end, beyond in ((high, torch.ge), (low, torch.le)):
        weight, _ = grid.weights(end.view(1, -1, 1, 1, 1), 1)
        assert bool(beyond(weight.view(1, -1, 1, 1), codes).all())


def test_gradient_of_weights_passes_beyond_the_range():
    weight = nn.Parameter(torch.tensor([[[[-5.0]], [[50.0]]]]))
    nearest, _ = FOUR_BITS.weights(weight, 1)
    nearest.sum().backward()
    assert weight.grad.flatten().tolist() == [1, 1]


def test_exponents_are_the_best_assignment():
    """No other assignment of channels to octaves above the same base is nearer."""
    spans = torch.exp2(torch.rand(40) * 7)
    scale_exponent, base = channel_exponents(spans, 4)
    octaves = spans.log2()[:, None] - math.log2(base) - torch.arange(5)
    assert scale_exponent.tolist() == octaves.abs().argmin(1).tolist()


def test_dead_channels_draw_nobody_down():
    spans = torch.tensor([4.0, 4.0, 4.0, 1e-9])
    scale_exponent, base = channel_exponents(spans, 4)
    assert base * 2 ** float(scale_exponent[0]) == pytest.approx(4)
    assert scale_exponent[3] == 0


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_codes_shifted_fit_into_bytes(bits):
    high = torch.exp2(torch.randn(32) * 3)
    grid = grid_for(torch.zeros(32), high, bits)
    assert int((grid.quant_max * torch.exp2(grid.scale_exponent)).max()) <= 255
    assert int(grid.zero_point.max()) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("unit", [None, 1.0])
def test_no_code_lies_above_what_the_activation_clamps_to(bits, unit):
    grid = grid_for(torch.zeros(3), torch.tensor([6.0, 5.9, 2.0]), bits, ceiling=6.0, unit=unit)
    assert float(grid.high.max()) <= 6 + 1e-5


def test_scales_of_shifts_are_powers_of_two():
    for span in (0.3, 1.7, 11.0):
        scale = grid_for(torch.zeros(1), torch.tensor([span]), 8, unit=1 / 49).scale
        assert math.log2(scale * 49) == pytest.approx(round(math.log2(scale * 49)), abs=1e-6)


def test_signed_range_holds_both_ends():
    grid = grid_for(torch.tensor([-1.0, -0.1]), torch.tensor([0.5, 1.2]), 8)
    assert bool((grid.low <= torch.tensor([-1.0, -0.1]) + grid.scale).all())
    assert bool((grid.high >= torch.tensor([0.5, 1.2]) - grid.scale).all())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_filters_have_transforms_of_their_own(bits):
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([0.01, 1, 10, 100, 0]).view(-1, 1, 1, 1)
    codes, step = signed_weights(weight, bits)
    assert int(codes.abs().max()) <= 2 ** (bits - 1) - 1
    error = (codes * step.view(-1, 1, 1, 1) - weight).square().flatten(1).sum(1)
    plain = weight.abs().flatten(1).amax(1) / (2 ** (bits - 1) - 1)
    rounded = (weight / plain.clamp_min(1e-30).view(-1, 1, 1, 1)).round() * plain.view(-1, 1, 1, 1)
    assert bool((error <= (rounded - weight).square().flatten(1).sum(1) * 1.0001 + 1e-12).all())
