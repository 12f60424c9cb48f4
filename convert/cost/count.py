"""What a network costs for one image, layer by layer, beside the CNN of the same shape: operations, bytes, energy.

Two counts stand side by side. The *headline* is the papers' (AdderNet, arXiv 1912.13200, tables 2 and 3): weight layers
alone, the first and the last taken for adder layers although they are none. The *honest* count is of what runs: first
and last layer as they are, normalizations, gates, residual sums, pooling, activations.

A BatchNorm is a multiplication and an addition for each value. Right behind a convolution it folds into the weights
and is not counted. Behind an adder layer it cannot: a filter's scale would have to go into ``|x - w|``, which scales
only if ``x`` does too, and ``x`` is shared by all filters. So a conversion brings these operations back.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..errors import AdderkitError
from ..graph.layers import input_size, meta_copy
from ..graph.modes import eval_mode, model_dtype, move_like
from ..quantization.fake_quantize import FakeQuantized
from .energy import PRECISIONS, Precision, arithmetic_energy, memory_energy
from .formulas import WEIGHT_LAYERS, Operations
from .operator_trace import Event, trace_operators


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One module's operations of one kind for one image, all calls together.

    Args:
        path: Module path; empty for what the model itself does between its modules.
        cls: Class name.
        kind: ``convolution``, ``linear``, ``adder``, ``normalization``, ``activation``, ``pooling``, ``residual``,
            ``gate``, ``softmax``, ``matrix product`` (of two activations), ``element-wise``.
        output_shape: ``(channels, height, width)``, or ``(features,)``, of the first call.
        operations: As the model is.
        before: As a CNN: adder layers as convolutions, the BatchNorms behind them folded into those.
        parameters: Parameters of the module itself; they stand in its first row only.
        weights: Of these, the values of a weight layer's weight.
        activations: Values read and written. A normalization or activation runs as the layer before it writes, and
            moves nothing.
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

    @property
    def multiplications(self) -> int:
        """Multiplications for one image."""
        return self.operations.multiplications

    @property
    def additions(self) -> int:
        """Additions for one image."""
        return self.operations.additions

    def weight_bytes(self, precision: Precision) -> int:
        """Bytes of the parameters: a weight is stored in the precision, biases and factors as its sums are."""
        return self.weights * precision.bytes + (self.parameters - self.weights) * precision.sum_bytes

    def activation_bytes(self, precision: Precision) -> int:
        """Bytes of the activations read and written."""
        return self.activations * precision.bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "path": self.path,
            "cls": self.cls,
            "kind": self.kind,
            "output_shape": list(self.output_shape),
            **self.operations.to_dict(),
            "before": self.before.to_dict(),
            "parameters": self.parameters,
            "weight_bytes": {name: self.weight_bytes(each) for name, each in PRECISIONS.items()},
            "activation_bytes": {name: self.activation_bytes(each) for name, each in PRECISIONS.items()},
            "energy_pj": _energies(self.before, self.operations),
        }


@dataclasses.dataclass(frozen=True)
class IntegerRow:
    """What one step of an integer network writes.

    Args:
        path: Layer of the float network.
        kind: What it sums.
        bits: Of the codes it writes; 32 for logits.
        groups: Groups of channels with steps of their own.
        sum_bits: Bits that its sums take at the most.
        low: Least real value it can write, ``None`` for logits; ``high`` the largest.
        high: See ``low``.
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
    """What a model costs for one image.

    Args:
        layers: In order of execution.
        parameters: Of the whole model.
        input_shape: ``(channels, height, width)`` of the image.
        uncounted: Operators that ran and have no formula, by name.
        integers: Of an integer network, what its steps write.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    input_shape: tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    integers: tuple[IntegerRow, ...] = ()

    @property
    def honest(self) -> Operations:
        """Everything that runs, as it runs."""
        return _total(layer.operations for layer in self.layers)

    @property
    def honest_before(self) -> Operations:
        """Everything that would run in the CNN of the same shape."""
        return _total(layer.before for layer in self.layers)

    @property
    def headline(self) -> Operations:
        """The papers' count: weight layers alone; in an adder network, the first and last taken for adder layers."""
        rows = self.weight_layers
        counts = [Operations(products=row.operations.products, distances=row.operations.distances) for row in rows]
        if any(row.kind == "adder" for row in rows):
            counts[0], counts[-1] = counts[0].as_distances(), counts[-1].as_distances()
        return _total(counts)

    @property
    def headline_before(self) -> Operations:
        """The papers' count for the CNN of the same shape."""
        return self.headline.as_products()

    @property
    def weight_layers(self) -> tuple[LayerCost, ...]:
        """The convolution, linear and adder layers."""
        return tuple(layer for layer in self.layers if layer.kind in WEIGHT_LAYERS)

    @property
    def multiplications(self) -> int:
        """Multiplications for one image, honestly counted."""
        return self.honest.multiplications

    @property
    def additions(self) -> int:
        """Additions for one image, honestly counted."""
        return self.honest.additions

    def weight_bytes(self, precision: Precision) -> int:
        """Bytes of all parameters."""
        weights = sum(layer.weights for layer in self.layers)
        return weights * precision.bytes + (self.parameters - weights) * precision.sum_bytes

    def activation_bytes(self, precision: Precision) -> int:
        """Bytes of the activations read and written."""
        return sum(layer.activation_bytes(precision) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; the top level is the honest count."""
        return {
            "input_shape": list(self.input_shape),
            "multiplications": self.multiplications,
            "additions": self.additions,
            "parameters": self.parameters,
            "headline": {"before": self.headline_before.to_dict(), "after": self.headline.to_dict()},
            "honest": {"before": self.honest_before.to_dict(), "after": self.honest.to_dict()},
            "energy_pj": _energies(self.honest_before, self.honest),
            "memory": {name: self._memory(precision) for name, precision in PRECISIONS.items()},
            "uncounted": list(self.uncounted),
            "integers": [dataclasses.asdict(row) for row in self.integers],
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def _memory(self, precision: Precision) -> dict[str, Any]:
        weights, activations = self.weight_bytes(precision), self.activation_bytes(precision)
        energy = memory_energy(weights + activations)
        return {"weight_bytes": weights, "activation_bytes": activations, "energy_pj": energy}


def cost(model: nn.Module, example_input: Tensor | Sequence[int] | None = None) -> Cost:
    """Count what one forward pass of one image costs, and what it would in the CNN of the same shape.

    What depends on the weights alone is done once, not for each image, and does not count. A model that is trained for
    integers counts as the float network that it was.

    Args:
        model: Any model, converted or not; one from timm says itself what images it takes. It is left untouched.
        example_input: For models that do not: an image batch ``[N, C, H, W]`` or the size ``(C, H, W)`` of an image.

    Returns:
        Rows in order of execution; their sum is ``honest``, the papers' count ``headline``.

    Raises:
        AdderkitError: The model cannot run on the input.
    """
    if isinstance(model, IntegerNetwork):
        from .integer import integer_cost  # here: it needs what stands above

        return integer_cost(model)
    if isinstance(model, FakeQuantized):
        model = model.float_model()  # rounding is done in training alone
    if example_input is None:
        example_input = input_size(model)
    image = example_input[:1] if isinstance(example_input, Tensor) else torch.zeros(1, *example_input)
    events, uncounted = _events(model, image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(_rows(model, events), parameters, tuple(image.shape[1:]), uncounted)


def _events(model: nn.Module, image: Tensor) -> tuple[list[Event], tuple[str, ...]]:
    try:
        return trace_operators(meta_copy(model), image.to("meta", model_dtype(model)))
    except Exception:
        # Some models cannot be copied, compute sizes from values or keep plain tensors; those run only for real.
        pass
    try:
        with eval_mode(model):
            return trace_operators(model, move_like(image, model))
    except Exception as error:
        raise AdderkitError(
            f"{type(model).__name__} cannot run on an input of shape {tuple(image.shape)}: {error}; "
            "give an input size that fits"
        ) from error


def _rows(model: nn.Module, events: Sequence[Event]) -> tuple[LayerCost, ...]:
    modules = dict(model.named_modules())
    groups: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        groups.setdefault((event.path, event.tally.kind), []).append(event)
    rows, described = [], set()
    for (path, kind), group in groups.items():
        own = 0 if path in described else sum(each.numel() for each in modules[path].parameters(recurse=False))
        described.add(path)
        counts = [_folded(event, events) for event in group]
        row = LayerCost(
            path=path,
            cls=type(modules[path]).__name__,
            kind=kind,
            output_shape=group[0].output_shape[1:],
            operations=_total(after for _, after in counts),
            before=_total(before for before, _ in counts),
            parameters=own,
            weights=min(own, max(event.tally.weights for event in group)),
            activations=sum(event.tally.moved for event in group),
        )
        if row.operations != Operations() or row.parameters or row.activations:
            rows.append(row)
    return tuple(rows)


def _folded(event: Event, events: Sequence[Event]) -> tuple[Operations, Operations]:
    """Operations as a CNN and as they are, BatchNorms folded where that can be done."""
    operations = event.tally.operations
    source = events[event.source] if event.foldable and event.source is not None else None
    if source is None or source.uses != 1 or source.tally.kind not in WEIGHT_LAYERS:
        return operations.as_products(), operations
    return Operations(), operations if source.tally.kind == "adder" else Operations()


def _total(operations: Iterable[Operations]) -> Operations:
    return sum(operations, Operations())


def _energies(before: Operations, after: Operations) -> dict[str, dict[str, float]]:
    return {
        name: {"before": arithmetic_energy(before, each), "after": arithmetic_energy(after, each)}
        for name, each in PRECISIONS.items()
    }
