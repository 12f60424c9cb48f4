import copy

import pytest
import torch

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.quantization.config import QuantizeConfig
from adderkit.convert.quantization.quantize import quantize


@pytest.fixture
def network(teacher):
    def make(terms=1, **settings):
        images = torch.randn(32, 3, 8, 8)
        model = copy.deepcopy(teacher)
        adderkit.convert_(model, adderkit.AdderConfig(terms=terms), example_input=images[:1])
        reestimate_batchnorm_(model, [images])
        return quantize(model, images, QuantizeConfig(**settings))

    return make


# Values of TinyNet's layers for an image of 8x8: stem 8 channels, then 4x4 pixels, 6 channels at the end, 5 classes.
STEM, GROUPED, DEPTHWISE, POINTWISE = 8 * 64, 8 * 16, 8 * 16, 6 * 16


def test_terms_and_requantizations_of_each_layer(network):
    cost = adderkit.cost(network())
    rows = {row.path: row.operations for row in cost.layers}
    assert rows["stem"].products == STEM * 3 * 9
    assert rows["grouped"].distances == GROUPED * 4 * 9
    assert rows["depthwise"].distances == DEPTHWISE * 9
    assert rows["pointwise"].distances == POINTWISE * 8
    assert rows["head"].products == 5 * 6
    assert cost.honest.scalings == STEM + GROUPED + DEPTHWISE + POINTWISE + 6 + 5
    assert cost.honest.multiplications == STEM * 27 + 30 + cost.honest.scalings
    assert cost.honest_before.multiplications == cost.honest.multiplications + cost.honest.distances


def test_each_term_counts(network):
    """Distances T times, the CNN's products once, and an addition for each further term of an output."""
    one, cost = adderkit.cost(network()), adderkit.cost(network(terms={"grouped": 3, "depthwise": 2}))
    before = {row.path: row for row in one.layers}
    for row in cost.layers:
        terms = {"grouped": 3, "depthwise": 2}.get(row.path, 1)
        outputs = {"grouped": GROUPED, "depthwise": DEPTHWISE}.get(row.path, 0)
        assert row.terms == terms
        assert row.before == before[row.path].before
        assert row.operations.distances == terms * before[row.path].operations.distances
        assert row.operations.sums == before[row.path].operations.sums + outputs * (terms - 1)
        assert row.weights == terms * before[row.path].weights
    assert cost.honest.multiplications == one.honest.multiplications


def test_shifts_multiply_nothing_between_first_and_last(network):
    cost = adderkit.cost(network(requant="shift"))
    assert cost.honest.scalings == 0
    assert cost.honest.multiplications == STEM * 27 + 30
    assert cost.honest_before.scalings > 0


def test_bits_and_ranges(network):
    rows = {row.path: row for row in adderkit.cost(network(bits=4)).integers}
    assert [rows[path].bits for path in ("stem", "grouped", "depthwise", "head")] == [4, 4, 4, 32]
    assert rows["pointwise"].bits == 8  # the classifier reads it
    assert rows["stem"].low == 0 < rows["stem"].high
    assert rows["head"].low is None


def test_first_and_last_in_floats_count(network):
    cost = adderkit.cost(network(first_last="fp32"))
    assert [row.path for row in cost.layers] == ["stem", "grouped", "depthwise", "pointwise", "mean", "head"]
    assert cost.honest.products == STEM * 27 + 30
    assert cost.input_shape == (3, 8, 8)
