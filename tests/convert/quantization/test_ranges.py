"""The choice of ranges against a search written out with the reference's formulas; grids: ``test_integer_grids.py``."""

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adderkit
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.errors import AdderkitError
from adderkit.convert.quantization.config import QuantizeConfig
from adderkit.convert.quantization.fake_quantize import fake_quantize_
from adderkit.convert.quantization.fused_ops import FusedGraph
from adderkit.convert.quantization.grids import grid_for
from adderkit.convert.quantization.ranges import PERCENTILES, images_that_fit, set_ranges_

SIZE = (3, 8, 8)


def chosen(model, images, **config):
    """The twin of a model, and its ranges by path."""
    twin = copy.deepcopy(model)
    fake_quantize_(twin, QuantizeConfig(**config), tuple(images.shape[1:]))
    return twin, {found.path: found for found in set_ranges_(twin, model, images)}


@pytest.fixture
def images():
    return torch.randn(40, *SIZE)


def two_layers(images, clamp=nn.ReLU6, between=nn.Identity):
    """A strided adder layer, normalized and clamped, that a depthwise one reads."""
    model = nn.Sequential(
        adderkit.AdderConv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        clamp(),
        between(),
        adderkit.AdderConv2d(4, 4, 3, padding=1, groups=4),
        nn.BatchNorm2d(4),
    )
    nn.init.uniform_(model[1].weight, 1, 3)
    nn.init.normal_(model[1].bias, 1)
    for layer in (model[0], model[4]):
        nn.init.uniform_(layer.weight, -0.5, 2)
    reestimate_batchnorm_(model, [images])
    return model.eval()


def left_unexplained(values, target):
    """By least squares with an intercept, channel by channel."""
    shares = []
    rows = (each.detach().double().transpose(0, 1).flatten(1) for each in (values, target))
    for x, y in zip(*rows, strict=True):
        table = numpy.stack([x.numpy(), numpy.ones(len(x))], 1)
        rest = y.numpy() - table @ numpy.linalg.lstsq(table, y.numpy(), rcond=None)[0]
        shares.append((rest**2).sum() / ((y - y.mean()) ** 2).sum().item())
    return float(numpy.mean(shares))


def nearest_of_all(values, grid):
    """Each value's nearest among all that its channel's codes stand for."""
    rows = values.transpose(0, 1)
    found = torch.empty_like(rows)
    for channel, row in enumerate(rows):
        points = (torch.arange(grid.quant_max + 1) - grid.zero_point[channel]) * grid.step_size[channel]
        found[channel] = points[(row[..., None] - points).abs().argmin(-1)]
    return found.transpose(0, 1)


def distances(layer, values, grid=None):
    weight = layer.weight.detach()
    if grid is not None:  # [O, C / groups, …] to rows of the input's channels, clamped with what that costs given back
        rows = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        low, high = grid.low.view(-1, 1, 1, 1), grid.high.view(-1, 1, 1, 1)
        inside = rows.clamp(low, high)
        beyond = (rows - inside).abs().unflatten(0, (layer.groups, -1)).sum((1, 3, 4)).flatten()
        rounded = nearest_of_all(inside.transpose(0, 1), grid).transpose(0, 1)
        weight = rounded.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    bias = layer.bias
    result = adder_conv2d_reference(
        values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
    ).detach()
    return result if grid is None else result - beyond.view(-1, 1, 1)


def grids_that_compete(values, exact, bits, ceiling):
    """Those of each percentile and, of shares of the largest value, the one of least squared error."""
    rows = values.transpose(0, 1).flatten(1).sort(1).values
    last = rows.shape[1] - 1
    ends = [(rows[:, round((1 - share) * last)], rows[:, round(share * last)]) for share in PERCENTILES]
    ends += [(share * rows[:, 0], share * rows[:, -1]) for share in torch.arange(0.25, 1.01, 0.05)]
    grids = [grid_for(low.clamp(max=0), high.clamp(min=0), bits, ceiling=ceiling) for low, high in ends]
    count = len(PERCENTILES)
    errors = [float((nearest_of_all(values[:32], grid) - exact[:32]).square().mean()) for grid in grids[count:]]
    return [*grids[:count], grids[count + errors.index(min(errors))]]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_range_is_the_one_that_costs_the_reader_least(images, bits):
    model = two_layers(images)
    twin, ranges = chosen(model, images, bits=bits)
    first, norm, _, _, reader, _ = model
    image_grid = twin.grid(0)
    rounded = nearest_of_all(images, image_grid)
    values = distances(first, rounded, image_grid)
    values = F.relu6(F.batch_norm(values, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)).detach()
    exact = F.relu6(norm(first(images))).detach()
    grids = grids_that_compete(values, exact, bits, 6.0)
    wanted = distances(reader, exact[:32])
    errors = [left_unexplained(distances(reader, nearest_of_all(values[:32], g), g), wanted) for g in grids]
    best = grids[errors.index(min(errors))]
    held = twin.grid(1)
    assert ranges["0"].error == pytest.approx(min(errors), rel=1e-3)
    torch.testing.assert_close(held.step_size, best.step_size)
    assert ranges["0"].high == pytest.approx(float(best.high.max()))
    assert ranges["0"].bits == bits


def test_few_large_values_do_not_widen_the_range(images):
    """One pixel of 40 images is 100 times as large in the layer's input: below 8 bits the range leaves it out."""
    model = two_layers(images, nn.ReLU)
    model[1].weight.data.mul_(-1)  # large distances become large values
    reestimate_batchnorm_(model, [images])
    wild = images.clone()
    wild[0, :, 0, 0] *= 100
    values = model[:3](wild)
    _, ranges = chosen(model, wild, bits=4)
    assert ranges["0"].high < 0.5 * float(values.detach().max())
    assert ranges["0"].high > float(values.flatten().quantile(0.9))


def test_the_image_keeps_its_whole_range(images):
    """The widest channel's ends are those of the codes; the others have the same step, and room."""
    images[:, 1] *= 2
    twin, ranges = chosen(two_layers(images), images)
    grid = twin.grid(0)
    low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    assert (ranges[""].rule, ranges[""].bits) == ("percentile 1", 8)
    assert grid.scale == pytest.approx(float((high - low)[1]) / 255)
    assert bool((grid.low <= low + grid.scale).all())
    assert bool((grid.high >= high - grid.scale).all())
    assert (ranges[""].low, ranges[""].high) == (float(grid.low.min()), float(grid.high.max()))


@pytest.mark.parametrize("requant", ["fixed", "shift"])
@pytest.mark.parametrize("bits", [8, 5])
def test_no_range_passes_the_clamp_or_goes_below_it(images, requant, bits):
    found = chosen(two_layers(images), images, bits=bits, requant=requant)[1]["0"]
    assert found.low == 0
    assert 0 < found.high <= 6 + 1e-5


def test_signed_activations_are_offset(images):
    twin, ranges = chosen(two_layers(images, nn.Identity), images)
    grid, values = twin.grid(1), two_layers(images, nn.Identity)[:2](images)
    assert values.min() < 0 < values.max()
    assert grid.zero_point.min() > 0
    assert grid.zero_point.max() < 255
    assert ranges["0"].low < 0 < ranges["0"].high


def test_the_reader_behind_a_max_pool_judges(images):
    """What pools receive is judged by the layer after it; what only a sum reads is judged by itself."""
    model = two_layers(images, between=lambda: nn.MaxPool2d(3, 2, 1))
    twin, ranges = chosen(model, images, bits=4)
    assert list(ranges) == ["", "0", "4"]  # a pool has no range of its own
    assert twin.grid(2).scale == twin.grid(1).scale
    pooled = F.max_pool2d(nearest_of_all(model[:3](images[:32]), twin.grid(1)), 3, 2, 1)
    wanted = distances(model[4], F.max_pool2d(model[:3](images[:32]), 3, 2, 1))
    # Values reach the pool from a rounded image here and there not: nearly the same.
    assert ranges["0"].error == pytest.approx(
        left_unexplained(distances(model[4], pooled, twin.grid(1)), wanted), abs=0.01
    )
    last = model(images[:32])
    assert ranges["4"].error == pytest.approx(left_unexplained(twin(images)[:32].view_as(last), last), abs=0.01)


def test_statistics_are_those_of_the_images_and_momenta_stay(images):
    model = two_layers(images)
    model[1].momentum, model[5].momentum = 0.3, None
    twin, _ = chosen(model, images)
    assert (twin[1].momentum, twin[5].momentum) == (0.3, None)
    assert [twin[1].training, twin[5].training] == [False, False]
    sums = distances(model[0], nearest_of_all(images, twin.grid(0)), twin.grid(0))
    torch.testing.assert_close(twin[1].running_mean, sums.mean((0, 2, 3)))
    torch.testing.assert_close(twin[1].running_var, sums.var((0, 2, 3)))


def test_images_that_fit():
    """Three times the four largest activations in fp32, by hand: 3 * 4 * (100 + 90 + 80 + 70) bytes for an image."""
    graph = FusedGraph(((1, 10, 10), (1, 9, 10), (2, 4, 10), (7, 10, 1), (1, 1, 1)), ())
    assert images_that_fit(graph, 5 * 4080) == 5
    assert images_that_fit(graph, 5 * 4080 - 1) == 4
    assert images_that_fit(graph, 10) == 1


class Aliased(nn.Module):
    """Two names for one tensor, and ``+=`` on one: torch.fx sees a sum that leaves the other as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 6)

    def forward(self, x):
        x = self.conv(x)
        y = other = x.relu()
        y += x
        return self.head(y + other).flatten(1)


def test_a_model_that_tracing_misunderstands_is_refused(images):
    with pytest.raises(AdderkitError, match=r"^Aliased cannot be quantized: the operations that torch\.fx finds give"):
        chosen(Aliased().eval(), images)
