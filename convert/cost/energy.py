"""Energy of a network by the table of Horowitz (ISSCC 2014, "Computing's energy problem", figure 1.1.9): 45 nm, 0.9 V.

A number format has two widths: products and differences are taken in the narrow one, and everything that is summed,
or done to a sum, in the wide one, as hardware and adderkit's kernels do. Memory is a separate figure: moving a value
costs more than computing with it, and a conversion changes nothing about that.
"""

import dataclasses

from .formulas import Operations


@dataclasses.dataclass(frozen=True)
class Precision:
    """A number format and what its operations cost, in pJ.

    Args:
        multiply: A multiplication of two stored values.
        subtract: An addition or subtraction of two stored values.
        bytes: Size of a stored value.
        sum_multiply: A multiplication of a sum.
        sum_add: An addition to a sum.
        sum_bytes: Size of a value in a sum's format: biases and factors of normalizations.
        sums: Name of the sums' format.
    """

    multiply: float
    subtract: float
    bytes: int
    sum_multiply: float
    sum_add: float
    sum_bytes: int
    sums: str


# pJ. Multiplication: 3.7 fp32, 1.1 fp16, 3.1 int32, 0.2 int8; addition: 0.9 fp32, 0.4 fp16, 0.1 int32, 0.03 int8.
PRECISIONS = {
    "fp32": Precision(3.7, 0.9, 4, 3.7, 0.9, 4, "fp32"),
    "fp16": Precision(1.1, 0.4, 2, 3.7, 0.9, 4, "fp32"),
    "int8": Precision(0.2, 0.03, 1, 3.1, 0.1, 4, "int32"),
}

_ACCESS_BYTES = 8  # the table's figures are for accesses of 64 bits
_ACCESS_PJ = {"sram_1mb": 100.0, "dram_least": 1300.0, "dram_most": 2600.0}


def arithmetic_energy(operations: Operations, precision: Precision) -> float:
    """Energy of multiplications and additions in pJ, without memory; ``functions`` have no price in the table.

    A product costs a narrow multiplication and a wide addition, a distance a narrow subtraction and a wide addition.
    """
    terms = operations.products + operations.distances
    return (
        operations.products * precision.multiply
        + operations.distances * precision.subtract
        + (terms + operations.sums) * precision.sum_add
        + operations.scalings * precision.sum_multiply
    )


def memory_energy(moved: int) -> dict[str, float]:
    """Energy in pJ of moving ``moved`` bytes to or from a 1 MB SRAM, or DRAM at the least and the most."""
    return {level: moved / _ACCESS_BYTES * energy for level, energy in _ACCESS_PJ.items()}
