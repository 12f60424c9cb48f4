"""Netlists written by hand: what the simulation computes, and what is counted."""

import itertools

import pytest

from benchmarks.gates.netlist import Netlist


def module(cells, **ports):
    """A module as Yosys writes it; ports by name: direction and wires."""
    return {
        "ports": {name: {"direction": direction, "bits": bits} for name, (direction, bits) in ports.items()},
        "cells": {
            str(number): {"type": kind, "connections": {pin: [wire] for pin, wire in pins.items()}}
            for number, (kind, pins) in enumerate(cells)
        },
    }


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("$_NOT_", lambda a: not a),
        ("$_NAND_", lambda a, b: not (a and b)),
        ("$_NOR_", lambda a, b: not (a or b)),
        ("$_XOR_", lambda a, b: a != b),
        ("$_XNOR_", lambda a, b: a == b),
        ("$_AOI3_", lambda a, b, c: not ((a and b) or c)),
        ("$_OAI3_", lambda a, b, c: not ((a or b) and c)),
        ("$_AOI4_", lambda a, b, c, d: not ((a and b) or (c and d))),
        ("$_OAI4_", lambda a, b, c, d: not ((a or b) and (c or d))),
        ("$_MUX_", lambda a, b, s: b if s else a),
        ("$_NMUX_", lambda a, b, s: not (b if s else a)),
    ],
)
def test_truth_tables(kind, function):
    count = function.__code__.co_argcount
    pins = ["A", "B", "S"] if "MUX" in kind else ["A", "B", "C", "D"][:count]
    wires = list(range(2, 2 + count))
    ports = {name: ("input", [wire]) for name, wire in zip(pins[:count], wires, strict=True)}
    netlist = Netlist(module([(kind, {**dict(zip(pins, wires, strict=False)), "Y": 9})], **ports, y=("output", [9])))
    rows = list(itertools.product((0, 1), repeat=count))
    found = netlist.simulate({pin: [row[place] for row in rows] for place, pin in enumerate(pins[:count])})
    assert found["y"] == [int(function(*row)) for row in rows]


# A full adder, its cells in no particular order: sum 7, carry 10.
FULL_ADDER = [
    ("$_XOR_", {"A": 6, "B": 4, "Y": 7}),
    ("$_NAND_", {"A": 8, "B": 9, "Y": 10}),
    ("$_XOR_", {"A": 2, "B": 3, "Y": 6}),
    ("$_NAND_", {"A": 2, "B": 3, "Y": 8}),
    ("$_NAND_", {"A": 6, "B": 4, "Y": 9}),
]
PORTS = {"a": ("input", [2]), "b": ("input", [3]), "c": ("input", [4])}


def test_a_full_adder():
    netlist = Netlist(module(FULL_ADDER, **PORTS, total=("output", [7, 10])))
    rows = list(itertools.product((0, 1), repeat=3))
    found = netlist.simulate(dict(zip("abc", zip(*rows, strict=True), strict=True)))
    assert found["total"] == [sum(row) for row in rows]
    assert netlist.transistors == 2 * 12 + 3 * 4
    assert netlist.levels == 3  # XOR, NAND, NAND


def test_a_register_takes_its_next_value():
    cells = [("$_NOT_", {"A": 5, "Y": 6}), ("$_DFF_P_", {"C": 2, "D": 6, "Q": 5})]
    netlist = Netlist(module(cells, clk=("input", [2]), state=("output", [5])))
    assert netlist.simulate({"state": [0, 1]}) == {"state": [1, 0]}
    assert netlist.transistors == 2 + 16


def test_constant_outputs():
    assert Netlist(module([], a=("input", [2]), y=("output", ["1", 2, "0"]))).simulate({"a": [0, 1]}) == {"y": [1, 3]}
