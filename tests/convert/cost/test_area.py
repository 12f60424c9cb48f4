"""Area of the arithmetic, against gates counted by hand and networks written by hand."""

import json
from pathlib import Path

import pytest
import torch

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.cost import area
from adderkit.convert.cost.area import arithmetic_area, equal_weight_bits, name_equal_cnn, product_area
from adderkit.convert.cost.operations import Operations
from adderkit.convert.cost.report import Cost, LayerCost

RESULTS = Path(adderkit.__file__).parent / "docs" / "results" / "gates.json"

# Transistors of gates in static CMOS; a full adder is two XORs and three NANDs.
AND, XOR, MUX, REGISTER = 6, 12, 12, 16
FULL_ADDER = 2 * XOR + 3 * 4
ACCUMULATOR = 24 * (MUX + REGISTER)  # selects offset or sum, and keeps the sum


def per_cycle(**counts):
    """Transistors of one operation in each cycle."""
    return arithmetic_area(Operations(**counts), 8) * area.CYCLES


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
@pytest.mark.parametrize("weight_bits", area.WEIGHT_BITS)
def test_a_product_is_an_and_and_a_full_adder_per_pair_of_bits(bits, weight_bits):
    expected = bits * weight_bits * (AND + FULL_ADDER) + ACCUMULATOR / 16
    assert product_area(bits, weight_bits) == pytest.approx(expected, rel=0.13)


@pytest.mark.parametrize("bits", [8, 6, 5, 4])
def test_a_distance_is_a_subtraction_exclusive_ors_and_an_addition(bits):
    # The sign of each difference is one more bit to add.
    expected = bits * FULL_ADDER + bits * XOR + (bits + 1) * FULL_ADDER + ACCUMULATOR / 16
    found = arithmetic_area(Operations(distances=1), bits) * area.CYCLES
    assert found == pytest.approx(expected, rel=0.08)


def test_an_addition_and_requantizations():
    assert per_cycle(sums=1) == pytest.approx(24 * FULL_ADDER, rel=0.13)
    # 24 x 32 bits, as a product; the shifter has six stages of 57 multiplexers.
    multiplication = 24 * 32 * (AND + FULL_ADDER) + 6 * 57 * MUX
    assert per_cycle(scalings=1) == pytest.approx(multiplication, rel=0.13)
    # The shifter has five stages of 25 multiplexers, of which those below the byte need only some.
    assert 5 * 8 * 10 < per_cycle(shifts=1) < 5 * 25 * MUX


def test_the_table_is_that_of_the_benchmark():
    rows = json.loads(RESULTS.read_text())["rows"]

    def measured(circuit, **parameters):
        found = [row for row in rows if row["circuit"] == circuit and row["parameters"] == parameters]
        return found[0]["fast"]["transistors"]

    for bits in (8, 6, 5, 4):
        for weight_bits in area.WEIGHT_BITS:
            assert product_area(bits, weight_bits) == measured("products", A=bits, B=weight_bits) / 16
        distance = arithmetic_area(Operations(distances=area.CYCLES), bits)
        assert distance == pytest.approx(measured("distances", A=bits, T=1) / 16)
    addition = measured("addition")
    assert per_cycle(sums=1) == pytest.approx(addition)
    assert per_cycle(scalings=1, sums=1) == pytest.approx(measured("requantize_multiplier", M=32))
    assert per_cycle(shifts=1, sums=1) == pytest.approx(measured("requantize_shift"))


def test_between_whole_numbers_of_bits():
    assert product_area(8, 2.5) == pytest.approx((product_area(8, 2) + product_area(8, 3)) / 2)


@pytest.mark.parametrize(
    ("found", "bits", "words"),
    [
        (200, 2, "as much area as the CNN with 2-bit weights"),
        (325, 3.25, "as much area as the CNN with 3.2-bit weights"),
        (800, 8, "as much area as the CNN with 8-bit weights"),
        (199, None, "less area than the CNN with 2-bit weights"),
        (801, None, "more area than the CNN with 8-bit weights"),
    ],
)
def test_the_cnn_of_equal_area(found, bits, words):
    assert equal_weight_bits(found, lambda each: 100 * each) == bits
    assert name_equal_cnn(found, lambda each: 100 * each) == words


def layer(path, kind, **counts):
    operations = Operations(**counts)
    before = Operations(products=counts["distances"]) if kind == "adder" else operations
    return LayerCost(path, "", kind, (1,), operations, before, 0, 0, 0)


def network(*inner):
    first, last = layer("first", "convolution", products=1000), layer("last", "linear", products=100)
    return Cost((first, *inner, last), 0, (3, 8, 8))


def test_a_network_of_one_term_is_a_cnn_with_weights_of_two_bits():
    counted = network(layer("adder", "adder", distances=10_000), layer("norm", "normalization", scalings=50, sums=50))
    outer, norm = 1100 * product_area(8, 8), 50 * per_cycle(scalings=1, sums=1)
    for bits in (2, 3, 8):
        assert counted.cnn_area(bits) * area.CYCLES == pytest.approx(outer + 10_000 * product_area(8, bits) + norm)
    assert counted.area * area.CYCLES == pytest.approx(outer + 10_000 * per_cycle(distances=1) + norm)
    assert counted.equal_weight_bits == pytest.approx(2, abs=0.1)


def test_a_hybrid_lies_between():
    counted = network(layer("adder", "adder", distances=10_000), layer("kept", "convolution", products=10_000))
    assert counted.equal_weight_bits == pytest.approx((2 + 8) / 2, abs=0.1)


def test_two_terms_take_more_than_weights_of_four_bits():
    twice = LayerCost("adder", "", "adder", (1,), Operations(distances=2000), Operations(products=1000), 0, 0, 0)
    assert 4 < network(twice).equal_weight_bits < 4.2


def test_a_cnn_is_itself_whatever_its_layers():
    assert network().equal_weight_bits == 8
    assert network(layer("conv", "convolution", products=7)).equal_weight_bits == 8


def test_products_of_activations_are_not_narrowed():
    counted = network(layer("attention", "matrix product", products=10_000))
    assert counted.cnn_area(2) == counted.cnn_area(8) == counted.area


def test_a_quantized_network_counts_its_bits(teacher):
    images = torch.randn(16, 3, 8, 8)
    adderkit.convert_(teacher, example_input=images[:1])
    reestimate_batchnorm_(teacher, [images])
    settings = adderkit.QuantizeConfig(bits=4, requant="shift")
    counted = adderkit.cost(adderkit.quantize(teacher, images, settings))
    rows = {row.path: row for row in counted.layers}
    assert {path: rows[path].bits for path in ("stem", "grouped", "pointwise", "head")} == {
        "stem": 8,
        "grouped": 4,
        "pointwise": 4,
        "head": 8,
    }
    grouped = rows["grouped"].operations
    assert (grouped.scalings, grouped.shifts) == (0, grouped.sums)
    narrow = arithmetic_area(Operations(distances=grouped.distances), 4)
    rest = arithmetic_area(Operations(shifts=grouped.shifts, sums=grouped.sums))
    assert rows["grouped"].area == pytest.approx(narrow + rest)
    assert rows["grouped"].cnn_area(3) == pytest.approx(grouped.distances * product_area(4, 3) / area.CYCLES + rest)


def test_a_conversion_changes_only_the_terms(teacher):
    """BatchNorms that are folded, stay or are inserted: every output is requantized once, before and after."""
    cnn = adderkit.cost(teacher, (3, 8, 8))
    adderkit.convert_(teacher, example_input=torch.zeros(1, 3, 8, 8))
    counted = adderkit.cost(teacher, (3, 8, 8))
    assert counted.cnn_area(8) == pytest.approx(cnn.area)
    assert cnn.equal_weight_bits == 8
    difference = per_cycle(distances=1) - product_area(8, 8)
    assert (counted.area - cnn.area) * area.CYCLES == pytest.approx(counted.honest.distances * difference)


def test_every_output_of_a_layer_is_requantized():
    conv = torch.nn.Conv2d(3, 4, 1)
    rest = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 5))
    counted = adderkit.cost(torch.nn.Sequential(conv, *rest).eval(), (3, 2, 2))
    requantized = 4 * 2 * 2 + 5
    terms = (4 * 2 * 2 * 3 + 16 * 5) * product_area(8, 8)
    assert counted.area * area.CYCLES == pytest.approx(terms + requantized * per_cycle(scalings=1, sums=1))
