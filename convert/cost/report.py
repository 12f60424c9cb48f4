"""Cost of a network for one image, layer by layer, beside the CNN of the same shape. Needs no torch.

There are two counts. The *headline* is the papers' (AdderNet, arXiv 1912.13200, tables 2 and 3): weight layers only,
with the first and the last counted as adder layers although they are not. The *honest* count covers everything that
runs: first and last layer as they are, normalizations, gates, residual sums, pooling, activations.
"""

import dataclasses
from typing import Any

from .area import WEIGHT_BITS, arithmetic_area, equal_weight_bits
from .energy import PRECISIONS, Precision, arithmetic_energy, memory_energy
from .operations import WEIGHT_LAYERS, Operations, total


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one module's operations of one kind for one image, summed over all its calls.

    Args:
        path: Module path; empty for operations of the model itself, between its modules.
        cls: Class name.
        kind: ``convolution``, ``linear``, ``adder``, ``normalization``, ``activation``, ``pooling``, ``residual``,
            ``gate``, ``softmax``, ``matrix product`` (of two activations) or ``element-wise``.
        output_shape: ``(channels, height, width)`` or ``(features,)`` of the first call.
        operations: Operations of the model as it is.
        before: Operations as a CNN: adder layers are convolutions, with the BatchNorms after them folded in.
        parameters: Number of parameters of the module itself, in its first row only.
        weights: Number of those parameters that belong to the weight of a weight layer.
        activations: Number of values read and written. A normalization or activation is fused into the layer before it
            and moves none.
        bits: Bits of the operands as integers.
        requantized: Number of outputs of a weight layer that integers must scale besides ``operations``: those that no
            normalization of the model scales.
        terms: Terms of each weight of an adder layer.
    """

    path: str
    cls: str
    kind: str
    output_shape: tuple[int, ...]
    operations: Operations
    before: Operations
    parameters: int
    weights: int
    activations: int
    bits: int = 8
    requantized: int = 0
    terms: int = 1

    @property
    def multiplications(self) -> int:
        """Multiplications for one image."""
        return self.operations.multiplications

    @property
    def additions(self) -> int:
        """Additions for one image."""
        return self.operations.additions

    def weight_bytes(self, precision: Precision) -> int:
        """Return the bytes of the parameters: weights as stored values, biases and factors as sums."""
        return self.weights * precision.bytes + (self.parameters - self.weights) * precision.sum_bytes

    def activation_bytes(self, precision: Precision) -> int:
        """Return the bytes of the activations read and written."""
        return self.activations * precision.bytes

    @property
    def area(self) -> float:
        """Transistors of the arithmetic; see ``area.py``."""
        return arithmetic_area(self.operations + self._requantization, self.bits)

    def cnn_area(self, weight_bits: float) -> float:
        """Return the transistors as a layer of a CNN with such weights and the same requantization.

        Products of two activations keep their bits.
        """
        if self.kind not in WEIGHT_LAYERS:
            return self.area
        own = {"scalings": self.operations.scalings, "shifts": self.operations.shifts}
        operations = dataclasses.replace(self.before, **own) + self._requantization
        return arithmetic_area(operations, self.bits, weight_bits)

    @property
    def _requantization(self) -> Operations:
        return Operations(scalings=self.requantized, sums=self.requantized)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "path": self.path,
            "cls": self.cls,
            "kind": self.kind,
            "output_shape": list(self.output_shape),
            **self.operations.to_dict(),
            "before": self.before.to_dict(),
            "parameters": self.parameters,
            **({"terms": self.terms} if self.kind == "adder" else {}),
            "weight_bytes": {name: self.weight_bytes(each) for name, each in PRECISIONS.items()},
            "activation_bytes": {name: self.activation_bytes(each) for name, each in PRECISIONS.items()},
            "energy_pj": _energies(self.before, self.operations),
            "area": {"before": self.cnn_area(8), "after": self.area},
        }


@dataclasses.dataclass(frozen=True)
class IntegerRow:
    """Output of one step of an integer network.

    Args:
        path: Path of the layer in the float network.
        kind: Kind of the step.
        bits: Bits of the output codes; 32 for logits.
        groups: Number of channel groups with a scale of their own.
        sum_bits: Largest number of bits that the sums of the step need.
        low: Smallest real value that the output can represent, ``None`` for logits.
        high: Largest real value that the output can represent, ``None`` for logits.
    """

    path: str
    kind: str
    bits: int
    groups: int
    sum_bits: int
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a model for one image.

    Args:
        layers: Cost of each layer, in order of execution.
        parameters: Number of parameters of the whole model.
        input_shape: ``(channels, height, width)`` of the image.
        uncounted: Names of operators that ran but have no formula.
        integers: Output of each step, for an integer network.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    input_shape: tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    integers: tuple[IntegerRow, ...] = ()

    @property
    def honest(self) -> Operations:
        """Operations of everything that runs, as it runs."""
        return total(layer.operations for layer in self.layers)

    @property
    def honest_before(self) -> Operations:
        """Operations of everything that would run in the CNN of the same shape."""
        return total(layer.before for layer in self.layers)

    @property
    def headline(self) -> Operations:
        """The papers' count: weight layers only; in an adder network, the first and last count as adder layers."""
        rows = self.weight_layers
        counts = [Operations(products=row.operations.products, distances=row.operations.distances) for row in rows]
        if any(row.kind == "adder" for row in rows):
            counts[0], counts[-1] = counts[0].as_distances(), counts[-1].as_distances()
        return total(counts)

    @property
    def headline_before(self) -> Operations:
        """The papers' count for the CNN of the same shape."""
        return total(Operations(products=row.before.products) for row in self.weight_layers)

    @property
    def weight_layers(self) -> tuple[LayerCost, ...]:
        """The convolution, linear and adder layers."""
        return tuple(layer for layer in self.layers if layer.kind in WEIGHT_LAYERS)

    @property
    def multiplications(self) -> int:
        """Multiplications for one image, by the honest count."""
        return self.honest.multiplications

    @property
    def additions(self) -> int:
        """Additions for one image, by the honest count."""
        return self.honest.additions

    @property
    def area(self) -> float:
        """Transistors of the arithmetic of everything that runs; see ``area.py``."""
        return sum(layer.area for layer in self.layers)

    def cnn_area(self, weight_bits: float) -> float:
        """Return the transistors of the CNN of the same shape with such weights, and the same requantization.

        The weights of its first and last layer have 8 bits, as is usual.
        """
        outer = (*self.weight_layers[:1], *self.weight_layers[-1:])
        return sum(layer.cnn_area(8 if layer in outer else weight_bits) for layer in self.layers)

    @property
    def equal_weight_bits(self) -> float | None:
        """Bits of the weights with which the CNN has the same area, interpolated; ``None`` outside 2 to 8 bits."""
        return equal_weight_bits(self.area, self.cnn_area)

    def weight_bytes(self, precision: Precision) -> int:
        """Return the bytes of all parameters."""
        weights = sum(layer.weights for layer in self.layers)
        return weights * precision.bytes + (self.parameters - weights) * precision.sum_bytes

    def activation_bytes(self, precision: Precision) -> int:
        """Return the bytes of the activations read and written."""
        return sum(layer.activation_bytes(precision) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; the top level is the honest count."""
        return {
            "input_shape": list(self.input_shape),
            "multiplications": self.multiplications,
            "additions": self.additions,
            "parameters": self.parameters,
            "headline": {"before": self.headline_before.to_dict(), "after": self.headline.to_dict()},
            "honest": {"before": self.honest_before.to_dict(), "after": self.honest.to_dict()},
            "energy_pj": _energies(self.honest_before, self.honest),
            "area": {
                "after": self.area,
                "cnn": {str(bits): self.cnn_area(bits) for bits in WEIGHT_BITS},
                "equal_weight_bits": self.equal_weight_bits,
            },
            "memory": {name: self._memory(precision) for name, precision in PRECISIONS.items()},
            "uncounted": list(self.uncounted),
            "integers": [dataclasses.asdict(row) for row in self.integers],
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def _memory(self, precision: Precision) -> dict[str, Any]:
        weights, activations = self.weight_bytes(precision), self.activation_bytes(precision)
        energy = memory_energy(weights + activations)
        return {"weight_bytes": weights, "activation_bytes": activations, "energy_pj": energy}


def _energies(before: Operations, after: Operations) -> dict[str, dict[str, float]]:
    return {
        name: {"before": arithmetic_energy(before, each), "after": arithmetic_energy(after, each)}
        for name, each in PRECISIONS.items()
    }
