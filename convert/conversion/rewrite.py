"""Convolutions become adder layers in place, and back; and the record that replays a conversion on a fresh model.

A conversion changes the *class* of the module object, from ``Conv2d`` to a subclass of ``AdderConv2d``. So parameters,
device, dtype, mode, hooks, sharing and every reference to the module survive by construction. Two things may be added:
a transformed weight is folded into the parameter (``handlers``), and a BatchNorm is inserted (``layers``).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import AdderConv2dSame, NormalizedAdderConv2d, adder_layers
from ..errors import NoModuleMatchedError
from ..patterns import matching
from ..record import forget_, record_
from .config import AdderConfig
from .converters import plain_class
from .plan import ConversionPlan, plan
from .transforms import ADDER, PLAIN, change_classes_, conversion_transform


def convert_(
    model: nn.Module,
    plan_or_config: ConversionPlan | AdderConfig = AdderConfig(),  # noqa: B008 - frozen, hence safe as a default
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_input: Tensor | None = None,
) -> ConversionPlan:
    """Turn convolutions into adder layers, in place. Converting again what is converted changes nothing.

    Weights are kept as they are; ``calibrate_`` fits them to their new meaning.

    Args:
        model: The model to change.
        plan_or_config: A plan that ``plan`` made for this model, or the configuration to make one with.
        filter_fn: See ``plan``; only with a configuration.
        example_input: See ``plan``; only with a configuration.

    Returns:
        The plan that was carried out.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input, or the plan is not for this model.
    """
    todo = plan_or_config
    if isinstance(todo, AdderConfig):
        todo = plan(model, todo, filter_fn, example_input)
    elif filter_fn is not None or example_input is not None:
        raise ValueError("filter_fn and example_input go with a configuration; a plan is made already")
    converted = adder_layers(model)
    paths = [path for path in todo.paths("convert") if path not in converted]
    if paths:
        inserted = {row.path for row in todo.rows if row.inserted}
        normalized = [path for path in paths if path in inserted]
        folded = change_classes_(model, paths, ADDER, normalized)
        transform = conversion_transform(ADDER, paths, normalized=normalized, folded=folded)
        record_(model, {**transform, "config": todo.config.to_dict()})
    return todo


def revert_(model: nn.Module, include: Sequence[str] = ("*",)) -> int:
    """Turn adder layers back into convolutions, in place, with the weights they have now.

    An inserted normalization goes; a layer whose weight was folded becomes a plain convolution with that weight, which
    is recorded.

    Args:
        model: The model to change.
        include: Patterns as in ``AdderConfig``.

    Returns:
        The number of layers turned back.

    Raises:
        NoModuleMatchedError: No adder layer matches.
    """
    adders = {
        path: layer for path, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, AdderConv2d)
    }
    chosen = {id(layer): layer for path, layer in adders.items() if matching(include, path)}
    if not chosen:
        raise NoModuleMatchedError(
            f"{', '.join(map(repr, include))} matches none of {len(adders)} adder layers"
            + (f"; the first is {next(iter(adders))!r}" if adders else ": the model is not converted")
        )
    for layer in chosen.values():
        if isinstance(layer, NormalizedAdderConv2d):
            layer.remove_normalization_()
        plain: Any = plain_class(isinstance(layer, AdderConv2dSame))
        layer.__class__ = plain
    folded = forget_(model, {path for path, layer in adders.items() if id(layer) in chosen}, (ADDER,))
    if folded:
        record_(model, conversion_transform(PLAIN, folded))
    return len(chosen)


def is_converted(model: nn.Module) -> bool:
    """Whether the model holds an adder layer."""
    return bool(adder_layers(model))
