"""Count the operations, parameters and activations of a float network.

A BatchNorm takes a multiplication and an addition per value. Directly after a convolution it can be folded into the
weights and is not counted. After an adder layer it cannot: a filter's scale would have to go into ``|x - w|``, which
scales only if ``x`` does too, and ``x`` is shared by all filters. So a conversion brings these operations back.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import AdderkitError
from ..graph.layers import input_size, meta_copy
from ..graph.modes import eval_mode, model_dtype, move_like
from .operations import WEIGHT_LAYERS, Operations, total
from .operator_trace import Event, trace_operators
from .report import Cost, LayerCost

_logger = logging.getLogger(__name__)


def float_cost(model: nn.Module, example_input: Tensor | Sequence[int] | None = None) -> Cost:
    """Count the operations of one forward pass of a float network for one image.

    Args:
        model: Any model, converted or not. It is left untouched.
        example_input: Image batch ``[N, C, H, W]`` or size ``(C, H, W)`` of an image. By default the size comes from
            the model's timm configuration.

    Raises:
        AdderkitError: If the model cannot run on the input.
    """
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
        # Some models cannot be copied, compute sizes from values or keep plain tensors; those run only on real data.
        _logger.debug("cannot trace %s on the meta device", type(model).__name__, exc_info=True)
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
    normalized = {id(_normalized_layer(event, events)) for event in events}
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
            operations=total(after for _, after in counts),
            before=total(before for before, _ in counts),
            parameters=own,
            weights=min(own, max(event.tally.weights for event in group)),
            terms=max(event.tally.terms for event in group),
            activations=sum(event.tally.moved for event in group),
            requantized=sum(
                math.prod(event.output_shape)
                for event in group
                if (kind == "adder" and id(event) not in normalized) or kind in ("convolution", "linear")
            ),
        )
        if row.operations != Operations() or row.parameters or row.activations:
            rows.append(row)
    return tuple(rows)


def _folded(event: Event, events: Sequence[Event]) -> tuple[Operations, Operations]:
    """Return the operations of an event as a CNN and as they are, with BatchNorms folded where possible."""
    operations, before = event.tally.operations, event.tally.before
    source = _normalized_layer(event, events)
    if source is None:
        return operations if before is None else before, operations
    return Operations(), operations if source.tally.kind == "adder" else Operations()


def _normalized_layer(event: Event, events: Sequence[Event]) -> Event | None:
    """Return the weight layer whose outputs a BatchNorm, and nothing else, reads."""
    source = events[event.source] if event.foldable and event.source is not None else None
    return source if source is not None and source.uses == 1 and source.tally.kind in WEIGHT_LAYERS else None
