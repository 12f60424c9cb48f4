"""Area of arithmetic in integers, in transistors, from logic synthesis: ``benchmarks/gates`` and ``docs/hardware.md``.

A circuit that is twice as large can be used half as often, so the area of a network is that of an array which computes
one image in a million cycles: the sum over all operations of the transistors that each needs for one cycle. Memory,
registers for operands, wiring and clock are not included.
"""

import math
from collections.abc import Callable

from .operations import Operations

CYCLES = 1_000_000  # for one image: 1,000 images per second at 1 GHz
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)

_TREE = 16  # products or distances in each circuit of the next two tables
# By bits of the activation: a tree of products with weights of each of WEIGHT_BITS, and one of distances.
_PRODUCTS = {
    8: (11_708, 17_198, 22_706, 28_564, 34_646, 40_372, 46_242),
    6: (9_206, 13_304, 17_486, 22_334, 26_892, 31_688, 35_424),
    5: (7_734, 11_422, 15_070, 18_946, 23_066, 26_304, 29_386),
    4: (6_776, 9_632, 12_732, 15_942, 18_512, 21_136, 23_620),
}
_DISTANCES = {8: 11_786, 6: 9_208, 5: 7_894, 4: 6_482}
_ADDITION = 774
# An addition less, because Operations counts the one of a requantization among its sums.
_SCALING = 40_256 - _ADDITION
_SHIFT = 1_998 - _ADDITION


def product_area(bits: int, weight_bits: float) -> float:
    """Return the transistors of one accumulated product, interpolated between whole numbers of weight bits.

    Args:
        bits: Bits of the activation; the next wider entry of the table is used.
        weight_bits: Bits of the weight, from 2 to 8.
    """
    below = min(math.floor(weight_bits), WEIGHT_BITS[-1] - 1)
    first, second = _PRODUCTS[_entry(bits)][below - WEIGHT_BITS[0] :][:2]
    return (first + (weight_bits - below) * (second - first)) / _TREE


def arithmetic_area(operations: Operations, bits: int = 8, weight_bits: float | None = None) -> float:
    """Return the transistors that compute the operations in ``CYCLES`` cycles; ``functions`` are not in the table.

    Args:
        operations: The operations.
        bits: Bits of the operands of products and distances.
        weight_bits: Bits of the weights of products, where they differ from ``bits``.
    """
    transistors = (
        operations.products * product_area(bits, bits if weight_bits is None else weight_bits)
        + operations.distances * _DISTANCES[_entry(bits)] / _TREE
        + operations.scalings * _SCALING
        + operations.shifts * _SHIFT
        + operations.sums * _ADDITION
    )
    return transistors / CYCLES


def _entry(bits: int) -> int:
    return min(entry for entry in _DISTANCES if entry >= bits)


def equal_weight_bits(area: float, cnn_area: Callable[[float], float]) -> float | None:
    """Return the bits of the weights with which a CNN has a given area, interpolated; ``None`` outside 2 to 8 bits.

    Args:
        area: The area.
        cnn_area: Area of the CNN by the bits of its weights.
    """
    if area == cnn_area(WEIGHT_BITS[-1]):
        return WEIGHT_BITS[-1]
    for bits in WEIGHT_BITS[:-1]:
        first, second = cnn_area(bits), cnn_area(bits + 1)
        if first <= area < second:
            return bits + (area - first) / (second - first)
    return None


def name_equal_cnn(area: float, cnn_area: Callable[[float], float]) -> str:
    """Say in words which CNN has a given area; arguments as for ``equal_weight_bits``."""
    bits = equal_weight_bits(area, cnn_area)
    if bits is not None:
        return f"as much area as the CNN with {round(bits, 1):g}-bit weights"
    least, most = WEIGHT_BITS[0], WEIGHT_BITS[-1]
    if area < cnn_area(most):
        return f"less area than the CNN with {least}-bit weights"
    return f"more area than the CNN with {most}-bit weights"
