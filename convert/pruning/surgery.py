"""Remove channels from layers, and record the resulting shapes so that loading can rebuild them.

A checkpoint's ``prune`` transform holds the shape of each narrowed layer,
``{"layer1.0.conv1": [outputs, inputs, groups]}``. It is replayed on a new base model by narrowing each layer to its
first channels, whose values the saved weights then overwrite. So loading needs no dependency graph, and no record can
require more memory than the base model.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.modules import NormalizedAdderConv2d
from ..errors import CheckpointError
from ..record import Transform, check_version

PRUNE = "prune"
VERSION = 1
_PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.PReLU)
Target = nn.Module | nn.Parameter


@dataclasses.dataclass(frozen=True)
class Kept:
    """Channels of a layer that remain.

    Args:
        outputs: Sorted output channels, or channels of a per-channel module; ``None`` for all.
        inputs: Sorted input channels; ``None`` for all.
        axis: Axis of the channels in a bare parameter.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    axis: int = 0


def prune_transform(model: nn.Module, paths: Iterable[str], config: Mapping[str, Any]) -> Transform:
    """Return the transform for the record: the current shapes of the narrowed layers."""
    shapes = {path: list(shape_of(target_at(model, path))) for path in paths}
    return {"kind": PRUNE, "version": VERSION, "shapes": shapes, "config": dict(config)}


def target_at(model: nn.Module, path: str) -> Target | None:
    """Return the module or bare parameter with this path, or ``None``."""
    found: Any = model
    for name in path.split("."):
        own = {**found._parameters, **found._modules} if isinstance(found, nn.Module) else {}
        found = own.get(name)
    return found if isinstance(found, nn.Module | nn.Parameter) else None


def shape_of(target: Target | None) -> tuple[int, ...]:
    """Return the sizes that pruning may change.

    Returns:
        ``(outputs, inputs, groups)`` of a convolution, ``(outputs, inputs)`` of a linear layer, ``(channels,)`` of a
        per-channel module, the shape of a bare parameter; empty for modules that cannot be narrowed.
    """
    if isinstance(target, nn.Conv2d):
        return target.out_channels, target.in_channels, target.groups
    if isinstance(target, nn.Linear):
        return target.out_features, target.in_features
    if isinstance(target, nn.modules.batchnorm._BatchNorm):
        return (target.num_features,)
    if isinstance(target, nn.LayerNorm):
        return tuple(target.normalized_shape) if len(target.normalized_shape) == 1 else ()
    if isinstance(target, nn.PReLU):
        return (target.num_parameters,)
    return tuple(target.shape) if isinstance(target, nn.Parameter) else ()


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Return whether each output channel depends only on the input channel with the same index."""
    return layer.groups == layer.in_channels == layer.out_channels > 1


@torch.no_grad()
def narrow_(model: nn.Module, kept: Mapping[str, Kept]) -> None:
    """Remove channels from layers, in place: from parameters, statistics and the attributes that count channels.

    Args:
        model: The model to change.
        kept: Remaining channels of each layer, by path. All layers that share channels must be given.
    """
    features = _head_inputs(model)
    for path, part in kept.items():
        target = target_at(model, path)
        if isinstance(target, nn.Conv2d):
            _narrow_convolution(target, part)
        elif isinstance(target, nn.Linear):
            _narrow_linear(target, part)
        elif isinstance(target, _PER_CHANNEL) and part.outputs is not None:
            _narrow_per_channel(target, part.outputs)
        elif isinstance(target, nn.Parameter) and part.outputs is not None:
            parent, _, name = path.rpartition(".")
            _replace(model.get_submodule(parent), name, _picked(target, part.axis, part.outputs))
    now = _head_inputs(model)
    for name in ("num_features", "head_hidden_size"):  # timm creates new classifiers by these
        if features is not None and getattr(model, name, None) == features:
            setattr(model, name, now)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was if the context ends with an error, whatever was narrowed or computed until then."""
    modules = [(each, dict(vars(each)), dict(each._parameters), dict(each._buffers)) for each in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for module, attributes, parameters, buffers in modules:
            vars(module).update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise


def check_prune(transform: Mapping[str, Any]) -> None:
    """Refuse a malformed ``prune`` transform.

    Raises:
        CheckpointError: The version is unknown, or it holds no shapes.
    """
    check_version(transform, VERSION)
    shapes = transform.get("shapes")
    if not isinstance(shapes, Mapping) or not shapes:
        raise CheckpointError(f"shapes is {shapes!r:.80} in the 'prune' transform, expected shapes by module path")


def apply_prune_(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Apply a checked ``prune`` transform to a model that was built from its base architecture, in place.

    Raises:
        CheckpointError: A path is unknown, or pruning this model cannot give a shape.
    """
    narrow_(model, {path: _checked(model, path, shape) for path, shape in transform["shapes"].items()})


def _checked(model: nn.Module, path: Any, shape: Any) -> Kept:
    target = target_at(model, path) if isinstance(path, str) else None
    current = shape_of(target)
    if not current:
        found = "does not exist" if target is None else f"is a {type(target).__name__}"
        raise CheckpointError(
            f"{path!r:.80} {found}, expected a layer of the base model that the 'prune' transform narrows"
        )
    fits = (
        isinstance(shape, list | tuple)
        and len(shape) == len(current)
        and all(type(size) is int and 0 < size <= most for size, most in zip(shape, current, strict=True))
    )
    if not fits:
        raise CheckpointError(
            f"the shape of {path!r} is {shape!r:.80} in the 'prune' transform, expected at most {list(current)}"
        )
    if isinstance(target, nn.Conv2d):
        return _checked_convolution(path, target, *shape)
    if isinstance(target, nn.Parameter):
        return _checked_parameter(path, target, shape)
    return Kept(torch.arange(shape[0]), torch.arange(shape[1]) if len(shape) == 2 else None)


def _checked_convolution(path: str, layer: nn.Conv2d, outputs: int, inputs: int, groups: int) -> Kept:
    if is_depthwise(layer):
        if not outputs == inputs == groups:
            raise CheckpointError(
                f"the shape of {path!r} is {[outputs, inputs, groups]} in the 'prune' transform, expected three "
                "equal numbers for a depthwise convolution"
            )
        return Kept(torch.arange(outputs))
    if groups != layer.groups or outputs % groups or inputs % groups:
        raise CheckpointError(
            f"the shape of {path!r} is {[outputs, inputs, groups]} in the 'prune' transform, "
            f"expected {layer.groups} groups that divide both"
        )
    return Kept(_first(layer.out_channels, outputs, groups), _first(layer.in_channels, inputs, groups))


def _checked_parameter(path: str, target: nn.Parameter, shape: Any) -> Kept:
    differing = [axis for axis, size in enumerate(target.shape) if shape[axis] != size]
    if len(differing) != 1:
        raise CheckpointError(
            f"the shape of {path!r} is {list(shape)} in the 'prune' transform, expected {list(target.shape)} "
            "with one size smaller"
        )
    return Kept(torch.arange(shape[differing[0]]), axis=differing[0])


def _first(size: int, count: int, groups: int) -> Tensor:
    """Return the first channels of each group, ``count`` in total."""
    return (torch.arange(groups)[:, None] * (size // groups) + torch.arange(count // groups)).flatten()


def _narrow_convolution(layer: nn.Conv2d, part: Kept) -> None:
    before, weight = layer.out_channels, layer.weight
    if is_depthwise(layer):
        channels = part.outputs if part.outputs is not None else part.inputs
        assert channels is not None
        part = Kept(channels)
        layer.in_channels = layer.groups = len(channels)
    if part.outputs is not None:
        weight = _picked(weight, 0, part.outputs)
        layer.out_channels = len(part.outputs)
        for name, own in list(layer._parameters.items()):  # a bias, the gain of a standardized convolution
            if own is not None and name != "weight" and own.ndim and own.shape[0] == before:
                _replace(layer, name, _picked(own, 0, part.outputs))
        if isinstance(layer, NormalizedAdderConv2d):
            _narrow_per_channel(layer.normalization, part.outputs)
    if part.inputs is not None:
        first = torch.arange(layer.groups)[:, None] * (layer.in_channels // layer.groups)
        local = part.inputs.view(layer.groups, -1) - first
        rows = weight.unflatten(0, (layer.groups, -1))
        weight = torch.cat([_picked(own, 1, local[group]) for group, own in enumerate(rows)])
        layer.in_channels = len(part.inputs)
    _replace(layer, "weight", weight)


def _narrow_linear(layer: nn.Linear, part: Kept) -> None:
    weight = layer.weight
    if part.outputs is not None:
        weight = _picked(weight, 0, part.outputs)
        layer.out_features = len(part.outputs)
        if layer.bias is not None:
            _replace(layer, "bias", _picked(layer.bias, 0, part.outputs))
    if part.inputs is not None:
        weight = _picked(weight, 1, part.inputs)
        layer.in_features = len(part.inputs)
    _replace(layer, "weight", weight)


def _narrow_per_channel(layer: nn.Module, channels: Tensor) -> None:
    for tensors in (layer._parameters, layer._buffers):
        for name, value in list(tensors.items()):
            if value is not None and value.ndim:
                _replace(layer, name, _picked(value, 0, channels))
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (len(channels),)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(channels)
    else:
        layer.num_features = len(channels)  # type: ignore[assignment]


def _picked(tensor: Tensor, axis: int, channels: Tensor) -> Tensor:
    return tensor.index_select(axis, channels.to(tensor.device))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer by a tensor; a parameter keeps its ``requires_grad``."""
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = value
    elif old.shape != value.shape:
        module._parameters[name] = nn.Parameter(value, old.requires_grad)


def _head_inputs(model: nn.Module) -> int | None:
    timm_model: Any = model
    classifier = timm_model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(classifier, nn.Conv2d):
        return classifier.in_channels
    return classifier.in_features if isinstance(classifier, nn.Linear) else None
