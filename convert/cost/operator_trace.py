"""Trace a forward pass operator by operator: the cost of each, the module that called it, and the uses of its output.

Below the modules every computation is an aten operator, whether it comes from a layer, a function or a ``+``, so none
is missed in any model. Only operators that depend on the image are traced: the others run once, not for each image.
"""

import dataclasses
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..graph.hooks import hooked
from .formulas import BATCH_NORM_NAMES, Tally, call_of, tally, tensors_in


@dataclasses.dataclass
class Event:
    """One call of an operator that computes or moves something.

    Args:
        path: Path of the innermost module that was running; empty for the model itself.
        tally: Cost of the call.
        output_shape: Shape of the module's output with the batch, or of the operator's if the module has children.
        foldable: True for a BatchNorm with fixed statistics.
        source: Index of the event whose output is the first input, if any.
        uses: Number of operators that took the output.
    """

    path: str
    tally: Tally
    output_shape: tuple[int, ...]
    foldable: bool
    source: int | None
    uses: int = 0


@torch.no_grad()
def trace_operators(model: nn.Module, image: Tensor) -> tuple[list[Event], tuple[str, ...]]:
    """Run a model once and record its operators.

    Args:
        model: The model, in evaluation mode.
        image: ``[1, C, H, W]`` on the model's device.

    Returns:
        Events in order of execution, and the names of operators without a formula.
    """
    modules = dict(model.named_modules())
    with _Tracer(image) as tracer:

        def before(path: str, inputs: Any) -> None:
            tracer.running.append(path)

        def after(path: str, inputs: Any, output: Any) -> None:
            tracer.running.pop()
            is_leaf = not any(modules[path].children())
            if isinstance(output, Tensor) and is_leaf:  # a linear layer flattens its tokens inside
                for event in takewhile(lambda event: event.path == path, reversed(tracer.events)):
                    event.output_shape = tuple(output.shape)

        with hooked(modules, pre=before, post=after):
            model(image)
    return tracer.events, tuple(sorted(tracer.uncounted))


class _Tracer(TorchDispatchMode):
    """Dispatch mode that records every operator inside its context."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.running: list[str] = []
        self.events: list[Event] = []
        self.uncounted: set[str] = set()
        # Tensors that depend on the image, with their events; weak, so that a real pass keeps no activations.
        self._known = WeakTensorKeyDictionary()
        self._known[image] = None

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        inputs = [tensor for tensor in tensors_in((*args, *kwargs.values())) if tensor in self._known]
        if not outputs or not inputs:
            return result
        made_by = self._record(func, args, kwargs, outputs[0], inputs)
        for position, output in enumerate(outputs):
            self._known[output] = made_by if position == 0 else None
        return result

    def _record(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
        inputs: list[Tensor],
    ) -> int | None:
        """Record a call and return the index of its event, or ``None`` if it only views or moves values."""
        source: int | None = self._known[inputs[0]]
        for tensor in inputs:
            if (maker := self._known[tensor]) is not None:
                self.events[maker].uses += 1
        call = call_of(func, args, kwargs, output, self._known)
        found = Tally("") if func.is_view else tally(call)
        if found is None:
            self.uncounted.add(func._schema.name)
        if found is None or not found.kind:
            return None
        foldable = call.name in BATCH_NORM_NAMES and not call.arguments[5]
        self.events.append(Event(self.running[-1], found, tuple(output.shape), foldable, source))
        return len(self.events) - 1
