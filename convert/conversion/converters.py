"""What is called a convolution, and what each kind becomes: plain ones, TensorFlow's padding, transformed weights.

A kind is converted only where the result is exact about padding and weight. A class that computes with a transform of
its weight (standardized, scaled by a gain) is *folded*: the transform's result becomes the weight, and what it was made
from is dropped. So an adder layer never carries a transform, and a folded layer that is turned back is a plain
convolution that computes the same function.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import AdderConv2dSame, NormalizedAdderConv2d, NormalizedAdderConv2dSame


@dataclasses.dataclass(frozen=True)
class ConvConverter:
    """How one exact class of convolution is converted.

    Args:
        same: Whether a module pads by the size of its input, as TensorFlow does.
        weight: The weight that a module computes with, ``[O, C / groups, kh, kw]``; ``None`` where it is the parameter.
        extras: Attributes that only the transform of the weight needs.
    """

    same: Callable[[nn.Conv2d], bool]
    weight: Callable[[nn.Conv2d], Tensor] | None = None
    extras: tuple[str, ...] = ()

    @property
    def folds_weight(self) -> bool:
        """Whether converting changes the weight parameter."""
        return self.weight is not None


def converter_of(cls: type[nn.Module]) -> ConvConverter | None:
    """The handler for exactly this class; a subclass may do more, so it is not taken for its base."""
    if cls is nn.Conv2d:
        return _PLAIN
    # By name, not by import: importing timm brings in our registry, which needs this module.
    return _TIMM.get(cls.__name__) if cls.__module__.startswith("timm.layers.") else None


def other_convolutions() -> dict[type[nn.Module], str]:
    """Classes that convolve without being a ``Conv2d``, and why they stay as they are."""
    from timm.layers import CondConv2d  # here: see ``converter_of``

    return {CondConv2d: "CondConv2d mixes its filters anew for every image"}


def adder_class(same: bool, normalized: bool) -> type[AdderConv2d]:
    """The class of an adder layer with these properties."""
    if normalized:
        return NormalizedAdderConv2dSame if same else NormalizedAdderConv2d
    return AdderConv2dSame if same else AdderConv2d


def plain_class(same: bool) -> type[nn.Conv2d]:
    """The class of a convolution that computes with its weight as it is."""
    if not same:
        return nn.Conv2d
    from timm.layers.conv2d_same import Conv2dSame  # here: see ``converter_of``

    result: type[nn.Conv2d] = Conv2dSame
    return result


@torch.no_grad()
def fold_weight_(layer: nn.Conv2d, handler: ConvConverter) -> None:
    """Make the weight that the layer computes with its parameter, and drop what it was made from."""
    if handler.weight is None:
        return
    layer.weight.copy_(handler.weight(layer))
    for name in handler.extras:
        if hasattr(layer, name):
            delattr(layer, name)


def _standardized(layer: nn.Conv2d, gain: Tensor | None = None) -> Tensor:
    """Each filter with mean 0 and variance 1, times a gain; by the very call that timm makes."""
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    eps = float(layer.eps)  # type: ignore[arg-type]
    return F.batch_norm(rows, None, None, gain, None, True, 0.0, eps).reshape_as(layer.weight)


def _scaled_standardized(layer: nn.Conv2d) -> Tensor:
    gain: Tensor = layer.gain * layer.scale  # type: ignore[operator]
    return _standardized(layer, gain.view(-1))


def _by_flag(layer: nn.Conv2d) -> bool:
    return bool(layer.same_pad)


_PLAIN = ConvConverter(same=lambda layer: False)
_TIMM = {
    "Conv2dSame": ConvConverter(same=lambda layer: True),
    "StdConv2d": ConvConverter(lambda layer: False, _standardized, ("eps",)),
    "StdConv2dSame": ConvConverter(_by_flag, _standardized, ("eps", "same_pad")),
    "ScaledStdConv2d": ConvConverter(lambda layer: False, _scaled_standardized, ("gain", "scale", "eps", "gain_init")),
    "ScaledStdConv2dSame": ConvConverter(
        _by_flag, _scaled_standardized, ("gain", "scale", "eps", "gain_init", "same_pad")
    ),
}
