"""A network as fused operations: each is a layer with what follows it, up to where bytes are written.

The normalizations, the residual sum and the activation function after a layer are one affine function and a clamp, so
they cost nothing once they are folded into the requantization of the layer's sums. A fused operation becomes one step
of an integer plan. It names modules by path and holds no tensors: ``fake_quantize.py`` computes it in fp32, ``fold.py``
makes the step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from ...adder_layers.geometry import POINT, Window

# The kinds of integer steps; ``match`` on them ends in ``assert_never``.
OpKind = Literal["adder", "convolution", "linear", "rescale", "max_pool", "average_pool"]
WEIGHT_KINDS = ("adder", "convolution", "linear")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FusedOp:
    """An operation that turns the bytes of one or two activations into those of another.

    Args:
        kind: Kind of the integer step that it becomes; ``linear`` is the classifier, whose sums are the logits.
        path: Path of the module that it is named after: the layer, or the module that stands alone.
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        window: Window of a layer or pooling.
        groups: Channel groups of a layer.
        norms: Paths of the normalizations of its sums, in order.
        residual: Number of the activation that is added after them; ``None`` without a residual.
        low: Lower bound to which the result is clamped.
        high: Upper bound to which the result is clamped.
    """

    kind: OpKind
    path: str
    input: int
    output: int = -1
    window: Window = POINT
    groups: int = 1
    norms: tuple[str, ...] = ()
    residual: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the activations it reads."""
        return (self.input,) if self.residual is None else (self.input, self.residual)

    @property
    def clamps(self) -> bool:
        """Whether the result is clamped."""
        return (self.low, self.high) != (-math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class FusedGraph:
    """A network as fused operations.

    Args:
        shapes: ``(channels, height, width)`` of each activation; number 0 is the image.
        ops: The operations in order; each reads what an earlier one wrote.
    """

    shapes: tuple[tuple[int, int, int], ...]
    ops: tuple[FusedOp, ...]

    def consumers(self, number: int) -> list[FusedOp]:
        """Return the layers with weights that read an activation, directly or through max-pooling."""
        found = []
        for op in self.ops:
            if number in op.reads and op.kind == "max_pool":
                found += self.consumers(op.output)
            elif op.input == number and op.kind in WEIGHT_KINDS:
                found.append(op)
        return found

    def run(self, image: T, visit: Callable[[FusedOp, Mapping[int, T]], T]) -> T:
        """Visit the operations in order, dropping each activation after its last use.

        Args:
            image: Value of activation 0.
            visit: Return the value of the activation that an operation writes; called with the operation and the
                values of the activations that are still in use, by number.

        Returns:
            The value that the last operation writes.
        """
        last_use = {number: index for index, op in enumerate(self.ops) for number in op.reads}
        values = {0: image}
        for index, op in enumerate(self.ops):
            values[op.output] = visit(op, values)
            for number in op.reads:
                if last_use[number] == index:
                    values.pop(number, None)
        return values[self.ops[-1].output]

    def activations_with_grid(self) -> list[int]:
        """Return the activations with a grid of their own: all except the logits and the outputs of max-pooling."""
        others = {op.output for op in self.ops if op.kind in ("max_pool", "linear")}
        return [number for number in range(len(self.shapes)) if number not in others]

    def grid_source(self, number: int) -> int:
        """Return the activation whose grid this one has: after max-pooling it is the input of the pooling."""
        for op in self.ops:
            if op.output == number and op.kind == "max_pool":
                return self.grid_source(op.input)
        return number
