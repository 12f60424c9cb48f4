"""Adder layers with TensorFlow's padding or a BatchNorm of their own; helpers for the adder layers of a model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .conv import AdderConv2d


def same_padding(size: Sequence[int], layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return TensorFlow's "same" padding, for ``ceil(size / stride)`` output pixels; an odd zero goes below or right.

    Args:
        size: ``(height, width)`` of the input.
        layer: The layer with the kernel, stride and dilation.

    Returns:
        ``(left, right, top, bottom)`` as ``F.pad`` takes it.
    """
    sides: list[int] = []
    for axis in (1, 0):
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        total = max((-(-size[axis] // layer.stride[axis]) - 1) * layer.stride[axis] + reach - size[axis], 0)
        sides += [total // 2, total - total // 2]
    return sides[0], sides[1], sides[2], sides[3]


class AdderConv2dSame(AdderConv2d):
    """Adder layer that pads as timm's ``Conv2dSame`` does, by the size of each input. Its own ``padding`` is 0."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, same_padding(input.shape[-2:], self)), weight, bias)


class NormalizedAdderConv2d(AdderConv2d):
    """Adder layer with a BatchNorm of its own, in place of a convolution that no BatchNorm follows.

    The output of an adder is negative and large. An activation after it would output zeros only, an addition would be
    dominated by it, and a GroupNorm would see little but the differences between its channels. The BatchNorm gives it
    the mean and variance that calibration measured at the convolution's output, and absorbs the convolution's bias.
    """

    normalization: nn.BatchNorm2d
    had_bias: bool

    def forward(self, input: Tensor | fx.Proxy) -> Tensor:
        """Apply the adder convolution and its BatchNorm to ``[N, C, H, W]``; returns ``[N, O, H', W']``."""
        output = super().forward(input)
        if isinstance(input, fx.Proxy):  # the node stands for the whole layer
            return output
        normalized: Tensor = self.normalization(output)
        return normalized

    def insert_normalization_(self) -> None:
        """Add the BatchNorm to an ``AdderConv2d`` whose class has just been changed to this one, and move its bias."""
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        normalization = nn.BatchNorm2d(self.out_channels, **factory).train(self.training)
        normalization.requires_grad_(self.weight.requires_grad)  # a frozen layer stays frozen
        self.had_bias = self.bias is not None
        if self.bias is not None:
            normalization.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
            self.bias = None
        self.normalization = normalization

    def remove_normalization_(self) -> None:
        """Remove the BatchNorm; a layer that had a bias gets the BatchNorm's."""
        if self.had_bias:
            self.bias = self.normalization.bias
        del self.normalization, self.had_bias


class NormalizedAdderConv2dSame(NormalizedAdderConv2d, AdderConv2dSame):
    """Adder layer with both TensorFlow's padding and a BatchNorm of its own."""


def adder_layers(model: nn.Module) -> dict[str, AdderConv2d]:
    """Return a model's adder layers by path, in order of registration; a shared layer appears once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdderConv2d)}


@contextmanager
def sharp_gradient(layers: Iterable[AdderConv2d], sharpness: float) -> Iterator[None]:
    """Set ``sharpness`` of adder layers inside the context, and restore it on exit.

    The layers are in training mode meanwhile, since ``sharpness`` has no effect in evaluation mode; their own modes are
    restored too. Submodules keep theirs.

    Args:
        layers: The adder layers.
        sharpness: Factor of ``w - x`` in the input's gradient, ``HardTanh(sharpness · (w - x))``.
    """
    before = [(layer, layer.training, vars(layer).get("sharpness")) for layer in layers]
    try:
        for layer, _, _ in before:
            layer.sharpness = sharpness
            layer.training = True
        yield
    finally:
        for layer, training, own in before:
            layer.training = training
            if own is None:
                vars(layer).pop("sharpness", None)  # back to the default of the class
            else:
                layer.sharpness = own
