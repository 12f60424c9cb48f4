"""Classes of convolutions that can be converted: plain ones, TensorFlow's padding, transformed weights.

A class is converted only where the result is exact about padding and weight. A class that computes with a transform of
its weight (standardized, scaled by a gain) is *folded*: the result of the transform becomes the weight, and what it was
computed from is dropped. So a converted layer never carries a transform, and a folded layer that is reverted is a plain
convolution that computes the same function.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ConvConverter:
    """Rules for converting convolutions of one exact class.

    Args:
        same_padding: Return whether a module pads by the size of its input, as TensorFlow does.
        weight: Return the weight ``[O, C / groups, kh, kw]`` that a module computes with; ``None`` if that is its
            parameter.
        extras: Attributes that only the transform of the weight needs.
    """

    same_padding: Callable[[nn.Conv2d], bool]
    weight: Callable[[nn.Conv2d], Tensor] | None = None
    extras: tuple[str, ...] = ()

    @property
    def folds_weight(self) -> bool:
        """Whether converting changes the weight parameter."""
        return self.weight is not None


def converter_of(cls: type[nn.Module]) -> ConvConverter | None:
    """Return the converter for exactly this class, or ``None``: a subclass may do more than its base class."""
    return _CONVERTERS.get(cls)


def plain_class(same_padding: bool) -> type[nn.Conv2d]:
    """Return the class of a convolution that computes with its weight as it is."""
    result: type[nn.Conv2d] = Conv2dSame if same_padding else nn.Conv2d
    return result


@torch.no_grad()
def fold_weight_(layer: nn.Conv2d, converter: ConvConverter) -> None:
    """Store the weight that the layer computes with as its parameter, and drop what it was computed from."""
    if converter.weight is None:
        return
    layer.weight.copy_(converter.weight(layer))
    for name in converter.extras:
        if hasattr(layer, name):
            delattr(layer, name)


def _standardized(layer: nn.Conv2d, gain: Tensor | None = None) -> Tensor:
    """Scale each filter to mean 0 and variance 1, times a gain ``[O]``, by the same call as timm."""
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    eps = float(layer.eps)  # type: ignore[arg-type]
    return F.batch_norm(rows, None, None, gain, None, True, 0.0, eps).reshape_as(layer.weight)


def _scaled_standardized(layer: nn.Conv2d) -> Tensor:
    gain: Tensor = layer.gain * layer.scale  # type: ignore[operator]
    return _standardized(layer, gain.view(-1))


def _always(layer: nn.Conv2d) -> bool:
    return True


def _never(layer: nn.Conv2d) -> bool:
    return False


def _by_flag(layer: nn.Conv2d) -> bool:
    return bool(layer.same_pad)


_CONVERTERS: dict[type[nn.Module], ConvConverter] = {
    nn.Conv2d: ConvConverter(_never),
    Conv2dSame: ConvConverter(_always),
    StdConv2d: ConvConverter(_never, _standardized, ("eps",)),
    StdConv2dSame: ConvConverter(_by_flag, _standardized, ("eps", "same_pad")),
    ScaledStdConv2d: ConvConverter(_never, _scaled_standardized, ("gain", "scale", "eps", "gain_init")),
    ScaledStdConv2dSame: ConvConverter(
        _by_flag, _scaled_standardized, ("gain", "scale", "eps", "gain_init", "same_pad")
    ),
}

# Classes that convolve without being a ``Conv2d``, and why they cannot be converted.
OTHER_CONVOLUTIONS: dict[type[nn.Module], str] = {CondConv2d: "CondConv2d mixes its filters for each image"}
