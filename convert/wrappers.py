"""Take wrappers off a model: ``torch.compile``, parallel training, averages of the weights.

A wrapper passes images on to the model and adds prefixes to its parameters' names. Functions that only look at a model
take it out of any of them. Functions that change it do so where the wrapper does not mind; one that keeps a list of the
parameters, as DistributedDataParallel and averages do, would go on with those of before, so it is refused.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from .errors import AdderkitError


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """A class of wrappers.

    Args:
        attribute: Where it keeps the model.
        mind: Why the model must not change inside of it; empty if it may.
    """

    attribute: str
    mind: str = ""


_SYNCHRONIZES = "which synchronizes the parameters that it was built with"
_AVERAGES = "which averages the parameters of another model with the same structure"
# By the name of the class or of a base class, so that no package has to be imported.
_WRAPPERS = {
    "OptimizedModule": _Wrapper("_orig_mod"),
    "DataParallel": _Wrapper("module"),
    "DistributedDataParallel": _Wrapper("module", _SYNCHRONIZES),
    "_FabricModule": _Wrapper("module", _SYNCHRONIZES),
    "AveragedModel": _Wrapper("module", _AVERAGES),
    "ModelEma": _Wrapper("ema", _AVERAGES),
    "ModelEmaV2": _Wrapper("module", _AVERAGES),
    "ModelEmaV3": _Wrapper("module", _AVERAGES),
}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: Any, changed: str = "", *, sharded: bool = False) -> nn.Module:
    """Return the model inside of any wrappers.

    Args:
        model: A module, or an average of timm, which is none.
        changed: Past participle of what is done to the model, such as ``"converted"``; empty if it is only read.
        sharded: Accept a model sharded by FSDP2, whose tensors the caller has from elsewhere.

    Raises:
        AdderkitError: It is no module, holds no layers (TorchScript), is sharded, or must not be changed.
    """
    while (wrapper := _wrapper_of(model)) is not None:
        inside = f"pass its .{wrapper.attribute}"
        if changed and wrapper.mind:
            raise AdderkitError(
                f"the model is inside a {type(model).__name__}, {wrapper.mind}: it must be {changed} before it is "
                f"wrapped ({inside} and wrap it again)"
            )
        model = getattr(model, wrapper.attribute)
    names = {cls.__name__ for cls in type(model).__mro__}
    if not isinstance(model, nn.Module):
        hint = (
            f"build it first, for example with timm.create_model({model!r:.60})"
            if isinstance(model, str)
            else "pass one"
        )
        raise AdderkitError(f"the model is a {type(model).__name__}, expected a torch.nn.Module: {hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise AdderkitError(
            f"{type(model).__name__} is a TorchScript model, whose layers are not accessible; pass the module that it "
            "was made from"
        )
    if not sharded and names.intersection(_SHARDED):
        raise AdderkitError(
            f"the model is sharded by {'FSDP' if _SHARDED[0] in names else 'FSDP2'}, so that this process holds only "
            "parts of its weights: pass the model from before it was sharded"
        )
    for path, module in model.named_modules():
        if _wrapper_of(module) is not None:
            raise AdderkitError(
                f"{path!r} in the model is a {type(module).__name__}, whose name becomes part of the module paths: "
                "pass the model with plain modules, and wrap them afterwards"
            )
    return model


def timm_models_in(model: nn.Module) -> list[str]:
    """Return the names of the attributes of a holder, such as a LightningModule, that are timm models."""
    return [name for name, child in model.named_children() if getattr(child, "pretrained_cfg", None)]


def _wrapper_of(model: Any) -> _Wrapper | None:
    for cls in type(model).__mro__:
        wrapper = _WRAPPERS.get(cls.__name__)
        if wrapper is not None and isinstance(getattr(model, wrapper.attribute, None), nn.Module):
            return wrapper
    return None
