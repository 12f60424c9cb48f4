"""The circuits that are synthesized, and what each must compute."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path

VERILOG = Path(__file__).with_name("verilog")
TERMS = 16  # products or distances in a tree
SUM_BITS = 24

Values = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Circuit:
    """A Verilog module of the folder ``verilog`` with values for its parameters.

    Args:
        module: Name of the module and of its file.
        parameters: Value of each parameter that differs from its default.
        inputs: Bits of each input port except the clock, and of each register that is an output port.
        compute: Values of the output ports for values of ``inputs``, all unsigned.
    """

    module: str
    parameters: Values
    inputs: Values
    compute: Callable[[Values], dict[str, int]]

    @property
    def verilog(self) -> Path:
        """File of the module."""
        return VERILOG / f"{self.module}.v"

    def vectors(self, count: int, seed: int = 0) -> list[dict[str, int]]:
        """Return random values of the inputs, preceded by all zeros and all ones."""
        generator = random.Random(seed)
        extremes = [{name: value * ((1 << bits) - 1) for name, bits in self.inputs.items()} for value in (0, 1)]
        drawn = [{name: generator.getrandbits(bits) for name, bits in self.inputs.items()} for _ in range(count - 2)]
        return extremes + drawn


def products(activation_bits: int = 8, weight_bits: int = 8) -> Circuit:
    """Return a tree of products of unsigned activations and signed weights."""
    # The tree adds p + 2^(A-1+B) - 2^(B-1) for each product p; the offset takes the constant back.
    constant = ((1 << activation_bits) - 1) << weight_bits - 1

    def compute(values: Values) -> dict[str, int]:
        activations = fields(values["x"], activation_bits)
        weights = [signed(field, weight_bits) for field in fields(values["w"], weight_bits)]
        total = sum(x * w + constant for x, w in zip(activations, weights, strict=True))
        return {"sum": _start(values) + total & mask(SUM_BITS)}

    inputs = {**_accumulator(), "x": TERMS * activation_bits, "w": TERMS * weight_bits}
    return Circuit("products", {"A": activation_bits, "B": weight_bits}, inputs, compute)


def distances(bits: int = 8, terms: int = 1) -> Circuit:
    """Return a tree of distances, with several terms per weight combined by shifts."""

    def compute(values: Values) -> dict[str, int]:
        activations, weights = fields(values["x"], bits), fields(values["w"], bits, terms * TERMS)
        total = 0
        for term in range(terms):
            row = weights[term * TERMS : (term + 1) * TERMS]
            total += sum(abs(x - w) for x, w in zip(activations, row, strict=True)) << terms - 1 - term
        return {"sum": _start(values) + total & mask(SUM_BITS)}

    inputs = {**_accumulator(), "x": TERMS * bits, "w": terms * TERMS * bits}
    return Circuit("distances", {"A": bits, "T": terms}, inputs, compute)


def max_min(bits: int = 8) -> Circuit:
    """Return a tree of distances, computed as the larger value minus the smaller one."""
    return dataclasses.replace(distances(bits), module="max_min", parameters={"A": bits})


def maxima(bits: int = 8) -> Circuit:
    """Return a tree of maxima, for filters that share the sum of the window."""

    def compute(values: Values) -> dict[str, int]:
        pairs = zip(fields(values["x"], bits), fields(values["w"], bits), strict=True)
        return {"sum": _start(values) + sum(max(pair) for pair in pairs) & mask(SUM_BITS)}

    return dataclasses.replace(distances(bits), module="maxima", parameters={"A": bits}, compute=compute)


def requantize_multiplier(multiplier_bits: int = 32) -> Circuit:
    """Return the requantization of a sum by a multiplier."""
    offset_bits = SUM_BITS + multiplier_bits

    def compute(values: Values) -> dict[str, int]:
        factor = signed(values["multiplier"], multiplier_bits)
        scaled = signed(values["sum"], SUM_BITS) * factor + signed(values["offset"], offset_bits)
        return {"q": min(max(scaled, 0) >> values["shift"], 255)}

    inputs = {"sum": SUM_BITS, "multiplier": multiplier_bits, "offset": offset_bits, "shift": 6}
    return Circuit("requantize_multiplier", {"M": multiplier_bits}, inputs, compute)


def requantize_shift() -> Circuit:
    """Return the requantization of a sum by a shift."""

    def compute(values: Values) -> dict[str, int]:
        moved = signed(values["offset"], SUM_BITS) - signed(values["sum"], SUM_BITS)
        return {"q": min(max(moved, 0) >> values["shift"], 255)}

    return Circuit("requantize_shift", {}, {"sum": SUM_BITS, "offset": SUM_BITS, "shift": 5}, compute)


def addition() -> Circuit:
    """Return the addition of two sums."""

    def compute(values: Values) -> dict[str, int]:
        return {"sum": values["a"] + values["b"] & mask(SUM_BITS)}

    return Circuit("addition", {}, {"a": SUM_BITS, "b": SUM_BITS}, compute)


def mask(bits: int) -> int:
    """Return the largest unsigned number of so many bits."""
    return (1 << bits) - 1


def signed(value: int, bits: int) -> int:
    """Read an unsigned number as two's complement."""
    return value - (value >> bits - 1 << bits)


def fields(value: int, bits: int, count: int = TERMS) -> list[int]:
    """Split a number into fields of so many bits, lowest first."""
    return [value >> place * bits & mask(bits) for place in range(count)]


def _accumulator() -> dict[str, int]:
    return {"first": 1, "offset": SUM_BITS, "sum": SUM_BITS}


def _start(values: Values) -> int:
    return values["offset"] if values["first"] else values["sum"]
