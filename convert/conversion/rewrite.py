"""Convert convolutions in place, and revert them.

A conversion changes the *class* of the module object, from ``Conv2d`` to a subclass that the target names. So
parameters, device, dtype, mode, hooks, sharing and every reference to the module survive by construction. Three
things may change besides: a transformed weight is folded into the parameter (``converters.py``), a weight with several
terms becomes a parameter of another shape, and a BatchNorm is inserted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.geometry import term_factors
from ..errors import NoModuleMatchedError
from ..patterns import matching
from ..record import forget_, record_
from ..wrappers import unwrapped
from .config import AdderConfig
from .converters import plain_class
from .plan import ConversionPlan, plan
from .reparameterize import guard_merges_
from .targets import ADDER, TARGETS, OwnNormalization, SeveralTerms, converted_layers, target_of
from .transforms import PLAIN, change_classes_, conversion_transform


def convert_(
    model: nn.Module,
    plan_or_config: ConversionPlan | AdderConfig = AdderConfig(),  # noqa: B008 - frozen, hence safe as a default
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_input: Tensor | None = None,
    *,
    to: str | None = None,
) -> ConversionPlan:
    """Convert convolutions to adder layers, in place. Layers that are converted already stay as they are.

    Weights keep their values, all terms the same; ``calibrate_`` fits them to their new meaning.

    Example:
        >>> model = timm.create_model("resnet50", pretrained=True)
        >>> teacher = copy.deepcopy(model)
        >>> plan = adderkit.convert_(model, adderkit.AdderConfig(exclude=("layer1.*",)))
        >>> adderkit.calibrate_(model, teacher, images)

    Args:
        model: The model to change.
        plan_or_config: A plan that ``plan`` made for this model, or the configuration to make one with.
        filter_fn: Called as ``filter_fn(module, path)`` for each convolution to convert; return false to skip it.
            Only with a configuration.
        example_input: ``[N, C, H, W]``, for models that do not say what images they take. Only with a configuration.
        to: Target of the conversion; by default ``"adder"``. Only with a configuration.

    Returns:
        The plan that was applied.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input, the plan is not for this model, or the target is
            unknown.
    """
    model, chosen = unwrapped(model, "converted"), plan_or_config
    if isinstance(chosen, AdderConfig):
        chosen = plan(model, chosen, filter_fn, example_input, to=to or ADDER)
    elif filter_fn is not None or example_input is not None or to is not None:
        raise ValueError("filter_fn, example_input and to go with a configuration, but a plan was given")
    converted = converted_layers(model)
    paths = [path for path in chosen.paths("convert") if path not in converted]
    _check_shapes(model, chosen)
    if paths:
        inserted = {row.path for row in chosen.rows if row.inserted}
        normalized = [path for path in paths if path in inserted]
        terms = {row.path: row.terms for row in chosen.rows if row.path in paths and row.terms > 1}
        folded = change_classes_(model, paths, chosen.target, normalized, terms)
        transform = conversion_transform(chosen.target, paths, terms, normalized=normalized, folded=folded)
        record_(model, {**transform, "config": chosen.config.to_dict()})
    return chosen


def _check_shapes(model: nn.Module, chosen: ConversionPlan) -> None:
    """Refuse a plan whose rows describe other convolutions than the model has under the same paths."""
    modules: dict[str, Any] = dict(model.named_modules())
    for row in chosen.rows:
        module = modules.get(row.path)
        if not isinstance(module, nn.Conv2d):
            continue  # refused in its turn if it is to be converted
        found = (tuple(module.kernel_size), module.groups, module.in_channels, module.out_channels)
        if found != (row.kernel, row.groups, row.in_channels, row.out_channels):
            raise NoModuleMatchedError(
                f"{row.path!r} has {module.in_channels} to {module.out_channels} channels and a kernel of "
                f"{tuple(module.kernel_size)}, expected {row.in_channels} to {row.out_channels} and {row.kernel}: this "
                "plan is not for this model"
            )


def revert_(model: nn.Module, include: Sequence[str] = ("*",)) -> int:
    """Turn converted layers back into convolutions with the weights that they have now, in place.

    An inserted normalization is removed. The terms of a weight become one, their mean, weighted by their factors. A
    layer whose weight was folded becomes a plain convolution with that weight, which is recorded.

    Example:
        >>> adderkit.revert_(model, ("layer4.*",))
        9

    Args:
        model: The model to change.
        include: Patterns of module paths as in ``AdderConfig``.

    Returns:
        The number of layers that were reverted.

    Raises:
        NoModuleMatchedError: No converted layer matches.
    """
    model = unwrapped(model, "reverted")
    layers = {
        path: layer
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Conv2d) and target_of(layer) is not None
    }
    chosen = {id(layer): layer for path, layer in layers.items() if matching(include, path)}
    if not chosen:
        raise NoModuleMatchedError(
            f"{', '.join(map(repr, include))} matches none of {len(layers)} converted layers"
            + (f"; the first is {next(iter(layers))!r}" if layers else ": the model is not converted")
        )
    for layer in chosen.values():
        target = target_of(layer)
        assert target is not None
        plain: Any = plain_class(target.site_of(layer).same_padding)
        if isinstance(layer, OwnNormalization):
            layer.remove_normalization_()
        if isinstance(layer, SeveralTerms) and layer.weight.ndim == 5:
            mean = _mean_of_terms(layer.weight.detach())
            layer.set_terms_(1)
            layer.weight.data.copy_(mean)
        layer.__class__ = plain
    guard_merges_(model)
    folded = forget_(model, {path for path, layer in layers.items() if id(layer) in chosen}, TARGETS)
    if folded:
        record_(model, conversion_transform(PLAIN, folded))
    return len(chosen)


def _mean_of_terms(weight: Tensor) -> Tensor:
    """Return the mean of the terms of ``[O, C / groups, T, kh, kw]``, each with its factor."""
    wide = weight.double()
    factors = term_factors(weight.shape[2], wide)
    return torch.einsum("ocjhw,j->ochw", wide, factors / factors.sum())
