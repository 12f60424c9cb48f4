"""A pruning is tried on a plain twin before the model is touched: what stays must compute what it computed before."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import AdderkitError
from .channel_groups import kept_parts, plain_twin
from .importance import readers
from .selection import Removal
from .surgery import narrow_, target_at

TOLERANCE = 1e-3


@torch.no_grad()
def check_pruning(model: nn.Module, removal: Sequence[Removal], image: Tensor) -> None:
    """Compare a narrowed twin with one whose layers read zero from the channels that are to go.

    That finds channels that a model shuffles, pads or cuts in a way that the dependency graph does not know. Models
    that normalize across channels are only run: there the two differ by nature.

    Args:
        model: The model to be pruned; it is left untouched.
        removal: What is to go.
        image: ``[1, C, H, W]``.

    Raises:
        AdderkitError: The pruned model does not run, or computes something else.
    """
    silent = plain_twin(model)
    narrowed = copy.deepcopy(silent)
    narrow_(narrowed, kept_parts(removal))
    for group, channels in removal:
        for member in readers(silent, group):
            layer = target_at(silent, member.path)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            _silence(layer, member.positions[torch.isin(member.roots, channels)])
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    try:
        found = narrowed(noise)
    except Exception as error:
        raise AdderkitError(
            f"{type(model).__name__} does not run without the channels: {error}; "
            "leave the layers concerned as they are with --ignore"
        ) from error
    if any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for module in silent.modules()):
        return
    for value, wanted in zip(_tensors(found), _tensors(silent(noise)), strict=True):
        size = wanted.abs().max()
        if value.shape != wanted.shape or (size.isfinite() and not (value - wanted).abs().max() <= TOLERANCE * size):
            raise AdderkitError(
                f"{type(model).__name__} mixes channels in a way that cannot be followed: without the least important "
                "ones it computes something else; prune another model, or leave more layers with --ignore"
            )


def _silence(layer: nn.Conv2d | nn.Linear, channels: Tensor) -> None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    each = layer.weight.shape[1]
    rows = layer.weight.data.unflatten(0, (groups, -1))  # a view [G, O / G, C / G, ...]
    rows[channels // each, :, channels % each] = 0


def _tensors(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
