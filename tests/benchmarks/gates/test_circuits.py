"""What the synthesized circuits must compute, against the reference implementations of the package."""

import json
import re
from pathlib import Path

import pytest
import torch

from adderkit.adder_layers.integer.plan import Requantization
from adderkit.adder_layers.integer.reference import requantize
from adderkit.adder_layers.reference import adder_conv2d_reference
from benchmarks.gates import circuits
from benchmarks.gates.circuits import SUM_BITS, TERMS, fields, mask, signed
from benchmarks.gates.netlist import Netlist
from benchmarks.gates.synthesis import MAPPINGS, check

ROOT = Path(__file__).resolve().parents[3]
COUNT = 20


def modulo(value: float) -> int:
    return int(value) & mask(SUM_BITS)


def start(vector):
    return vector["offset"] if vector["first"] else vector["sum"]


def window(vector, bits):
    return torch.tensor(fields(vector["x"], bits), dtype=torch.float64).reshape(1, TERMS, 1, 1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [circuits.distances, circuits.max_min])
def test_distances_are_an_adder_layer(make, bits):
    circuit = make(bits)
    for vector in circuit.vectors(COUNT):
        weight = torch.tensor(fields(vector["w"], bits), dtype=torch.float64).reshape(1, TERMS, 1, 1)
        expected = -adder_conv2d_reference(window(vector, bits), weight, None, 1, 0, 1, 1)
        assert circuit.compute(vector) == {"sum": modulo(start(vector) + expected.item())}


def test_terms_are_adder_layers_combined_by_shifts():
    circuit = circuits.distances(8, 3)
    for vector in circuit.vectors(COUNT):
        weights = torch.tensor(fields(vector["w"], 8, 3 * TERMS), dtype=torch.float64).reshape(3, 1, TERMS, 1, 1)
        outputs = [adder_conv2d_reference(window(vector, 8), each, None, 1, 0, 1, 1).item() for each in weights]
        expected = -4 * (outputs[0] + outputs[1] / 2 + outputs[2] / 4)
        assert circuit.compute(vector) == {"sum": modulo(start(vector) + expected)}


def test_maxima_give_the_distances():
    maxima, distances = circuits.maxima(), circuits.distances()
    for vector in maxima.vectors(COUNT):
        shared = sum(fields(vector["x"], 8)) + sum(fields(vector["w"], 8))
        total = maxima.compute(vector)["sum"] - start(vector)
        assert distances.compute(vector) == {"sum": modulo(start(vector) + 2 * total - shared)}


@pytest.mark.parametrize("weight_bits", [8, 3, 2])
def test_products_are_a_convolution_up_to_a_constant(weight_bits):
    circuit = circuits.products(8, weight_bits)
    zeros = circuit.compute({"first": 1, "offset": 0, "sum": 0, "x": 0, "w": 0})["sum"]
    for vector in circuit.vectors(COUNT):
        weights = [signed(field, weight_bits) for field in fields(vector["w"], weight_bits)]
        weight = torch.tensor(weights, dtype=torch.float64).reshape(1, TERMS, 1, 1)
        expected = torch.nn.functional.conv2d(window(vector, 8), weight).item()
        assert circuit.compute(vector) == {"sum": modulo(start(vector) + zeros + expected)}


def reference(total, multiplier, offset, shift):
    """Requantize one sum as an integer plan does."""
    tensor = torch.tensor([multiplier]), torch.tensor([offset]), torch.tensor([shift]), torch.tensor([0])
    return {"q": requantize(torch.tensor([total]), Requantization(*tensor), {}).item()}


def test_requantization_by_a_multiplier():
    circuit = circuits.requantize_multiplier()
    for vector in circuit.vectors(COUNT):
        factors = signed(vector["multiplier"], 32), signed(vector["offset"], 56), vector["shift"]
        assert circuit.compute(vector) == reference(signed(vector["sum"], SUM_BITS), *factors)


def test_requantization_by_a_shift():
    circuit = circuits.requantize_shift()
    for vector in circuit.vectors(COUNT):
        offset, total = (signed(vector[name], SUM_BITS) for name in ("offset", "sum"))
        assert circuit.compute(vector) == reference(total, -1, offset, vector["shift"])


@pytest.mark.parametrize(("bits", "wrong"), [([2, 3], False), ([3, 2], True)])
def test_gates_that_compute_something_else_are_found(bits, wrong):
    """Two wires, straight and exchanged."""
    circuit = circuits.Circuit("toy", {}, {"a": 2}, lambda values: {"y": values["a"]})
    ports = {"a": {"direction": "input", "bits": [2, 3]}, "y": {"direction": "output", "bits": bits}}
    netlist = Netlist({"ports": ports, "cells": {}})
    if not wrong:
        check(circuit, netlist, "fast")
        return
    with pytest.raises(ValueError, match=r"toy, fast: .* expected"):
        check(circuit, netlist, "fast")


def test_the_documented_figures_are_the_measured_ones():
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    tables = [line for line in text.partition("## Area of a network")[0].splitlines() if line.startswith("| ")]
    documented = {int(number.replace(",", "")) for number in re.findall(r"\d+,\d{3}", "".join(tables))}
    rows = json.loads((ROOT / "docs" / "results" / "gates.json").read_text())["rows"]
    assert documented - {row[name]["transistors"] for row in rows for name in MAPPINGS} == set()
    assert len(documented) > 40
