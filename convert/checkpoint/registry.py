"""Names that adderkit adds to timm's registry: the papers' networks, and ``adder``, which rebuilds a saved model.

A checkpoint written by adderkit says ``architecture: "adder"`` and ``model_args: {base, transforms}``. With adderkit
imported, ``timm.create_model("local-dir:…", pretrained=True)`` calls ``adder``; without it, timm refuses with ``Unknown
model (adder)``. If the checkpoint named its base architecture instead, timm would load it as a CNN and compute the
wrong function.

Importing timm imports this module, whichever module of adderkit imports timm first. So it imports nothing at the top
that could be that module: only timm, and the networks, which need nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import register_model
from torch import nn

from ..models import cifar as cifar  # registers the papers' networks


@register_model
def adder(
    pretrained: bool = False,
    base: str = "",
    transforms: Sequence[Mapping[str, Any]] = (),
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a base model, replay what was done to it, and load the saved weights.

    Args:
        pretrained: Load the weights that ``pretrained_cfg`` points to.
        base: Name of the base model in timm's registry.
        transforms: Record of what was done to the base model.
        pretrained_cfg: The saved configuration, as timm passes it.
        pretrained_cfg_overlay: Values that override it.
        cache_dir: Folder where the Hub's files are cached.
        **kwargs: Model arguments of the base model, such as ``num_classes``.

    Raises:
        CheckpointError: The base is not a plain registered name, or the transforms or the weights do not fit it.
    """
    from .saved_model import build_saved  # not at the top: it needs modules that may be importing timm right now

    kwargs.pop("pretrained_model_args", None)
    saved = pretrained_cfg if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, "to_dict", dict)()
    config = {**saved, **(pretrained_cfg_overlay or {})}
    return build_saved(base, transforms, kwargs, config, pretrained=pretrained, cache_dir=cache_dir)
