"""Energy of a network by the table of Horowitz (ISSCC 2014, "Computing's energy problem", figure 1.1.9): 45 nm, 0.9 V.

A number format has two widths: products and differences are computed in the narrow one, and sums and operations on
sums in the wide one, as in hardware and adderkit's kernels. Memory is a separate figure: moving a value costs more than
computing with it, and a conversion does not change that.
"""

import dataclasses

from .operations import Operations


@dataclasses.dataclass(frozen=True)
class Precision:
    """A number format with the energy of its operations, in pJ.

    Args:
        multiply: Energy of multiplying two stored values.
        subtract: Energy of adding or subtracting two stored values.
        bytes: Size of a stored value.
        sum_multiply: Energy of multiplying a sum.
        sum_add: Energy of adding to a sum.
        sum_bytes: Size of a sum, and of the biases and factors of normalizations.
        sums: Name of the format of sums.
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
    """Return the energy of multiplications and additions in pJ, without memory; ``functions`` are not in the table.

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
    """Return the energy in pJ of moving ``moved`` bytes to or from a 1 MB SRAM, and DRAM (lowest and highest)."""
    return {level: moved / _ACCESS_BYTES * energy for level, energy in _ACCESS_PJ.items()}
