"""Adder layers that imitate more of their surroundings: TensorFlow's padding, and a normalization of their own."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import AdderConv2d


def same_padding(size: Sequence[int], layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """TensorFlow's "same": zeros so that the output has ``ceil(size / stride)`` pixels, the odd one below and right.

    Args:
        size: ``(height, width)`` of the input.
        layer: Its kernel, stride and dilation count.

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
    """An adder layer that pads as timm's ``Conv2dSame`` does: by the size of each input. Its own padding is 0."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(input, same_padding(input.shape[-2:], self)), weight, bias)


class NormalizedAdderConv2d(AdderConv2d):
    """An adder layer with a BatchNorm of its own, for a convolution that no BatchNorm follows.

    An adder's output is negative and large; what expects a convolution's (an activation, an addition) would be dead
    behind it, and a GroupNorm would see little but how far its channels lie apart. The normalization brings it to the
    mean and variance that calibration saw of the convolution's output. The convolution's bias is part of the
    normalization's.
    """

    normalization: nn.BatchNorm2d
    had_bias: bool

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, O, H', W']``."""
        output: Tensor = self.normalization(super().forward(input))
        return output

    def insert_normalization_(self) -> None:
        """Add the BatchNorm behind an ``AdderConv2d`` that has just become one of this class; its bias moves there."""
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        normalization = nn.BatchNorm2d(self.out_channels, **factory).train(self.training)
        self.had_bias = self.bias is not None
        if self.bias is not None:
            normalization.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
            self.bias = None
        self.normalization = normalization

    def remove_normalization_(self) -> None:
        """Take the BatchNorm out again; a convolution that had a bias gets the normalization's."""
        if self.had_bias:
            self.bias = self.normalization.bias
        del self.normalization, self.had_bias


class NormalizedAdderConv2dSame(NormalizedAdderConv2d, AdderConv2dSame):
    """Both: TensorFlow's padding, and a normalization of its own."""


def adder_layers(model: nn.Module) -> dict[str, AdderConv2d]:
    """Adder layers by path, in order of registration; a shared one once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdderConv2d)}


@contextmanager
def sharp_gradient(layers: Iterable[AdderConv2d], sharpness: float) -> Iterator[None]:
    """Inside the context, train layers with ``HardTanh(sharpness * (w - x))`` as the input's gradient.

    The layers are in training mode meanwhile, because ``sharpness`` has no effect in evaluation mode. Their own modes
    and sharpness are restored on exit; submodules are left alone.

    Args:
        layers: The adder layers.
        sharpness: Factor of the difference; ``AdderConv2d`` describes it.
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
