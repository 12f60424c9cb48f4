"""Check a pruning on a copy before the model is changed: the remaining channels must compute what they did before."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import AdderkitError
from ..graph.observe import returned_tensors
from .channel_groups import kept_parts, plain_copy
from .importance import readers
from .selection import Removal
from .surgery import narrow_, target_at

TOLERANCE = 1e-3


@torch.no_grad()
def check_pruning(model: nn.Module, removal: Sequence[Removal], image: Tensor) -> None:
    """Compare a narrowed copy with a copy whose layers have zero weights for the channels to remove.

    This finds channels that a model shuffles, pads or cuts in a way that the dependency graph does not know. For models
    that normalize across channels the two outputs differ, so those are only run.

    Args:
        model: The model to be pruned. It is left untouched.
        removal: The channels to remove.
        image: ``[1, C, H, W]``.

    Raises:
        AdderkitError: If the pruned model does not run, or computes something else.
    """
    silent = plain_copy(model)
    narrowed = copy.deepcopy(silent).eval()  # a copied torch.fx graph is in training mode
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
            f"{type(model).__name__} does not run without the removed channels: {error}; "
            "keep the affected layers with --ignore"
        ) from error
    if any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for module in silent.modules()):
        return
    for value, wanted in zip(returned_tensors(found), returned_tensors(silent(noise)), strict=True):
        size = wanted.abs().max()
        if value.shape != wanted.shape or (size.isfinite() and not (value - wanted).abs().max() <= TOLERANCE * size):
            raise AdderkitError(
                f"{type(model).__name__} mixes channels in a way that cannot be traced: without the least important "
                "channels its output is not as expected; prune another model, or keep more layers with --ignore"
            )


def _silence(layer: nn.Conv2d | nn.Linear, channels: Tensor) -> None:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    each = layer.weight.shape[1]
    rows = layer.weight.data.unflatten(0, (groups, -1))  # a view [G, O / G, C / G, ...]
    rows[channels // each, :, channels % each] = 0
