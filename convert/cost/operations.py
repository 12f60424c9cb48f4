"""Numbers of operations, and the kinds of layers that hold weights. Needs no torch."""

import dataclasses
from collections.abc import Iterable

WEIGHT_LAYERS = ("convolution", "linear", "adder")


@dataclasses.dataclass(frozen=True)
class Operations:
    """Operations for one image.

    Args:
        products: Accumulated products ``x·w``.
        distances: Accumulated distances ``|x - w|``.
        scalings: Other multiplications.
        shifts: Shifts by a stored number of bits, in place of a scaling.
        sums: Other additions and comparisons.
        functions: Exponentials, roots, divisions and the like.
    """

    products: int = 0
    distances: int = 0
    scalings: int = 0
    shifts: int = 0
    sums: int = 0
    functions: int = 0

    @property
    def multiplications(self) -> int:
        """All multiplications."""
        return self.products + self.scalings

    @property
    def additions(self) -> int:
        """All additions: one per product, two per distance, and the others."""
        return self.products + 2 * self.distances + self.sums

    def __add__(self, other: "Operations") -> "Operations":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Operations(*(mine + its for mine, its in pairs))

    def as_distances(self) -> "Operations":
        """Return the operations with every product replaced by a distance, as in an adder layer."""
        return dataclasses.replace(self, products=0, distances=self.products + self.distances)

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-ready mapping: the totals first, then their parts."""
        return {
            "multiplications": self.multiplications,
            "additions": self.additions,
            **dataclasses.asdict(self),
        }


def total(operations: Iterable[Operations]) -> Operations:
    """Add up operations."""
    return sum(operations, Operations())
