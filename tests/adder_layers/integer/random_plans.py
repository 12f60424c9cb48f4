"""Random steps and whole networks in integers, for every implementation to be compared on."""

import dataclasses

import torch
from torch import Tensor

from adderkit.adder_layers.geometry import POINT, Window
from adderkit.adder_layers.integer.plan import (
    Activation,
    Adder,
    AveragePool,
    Convolution,
    IntegerPlan,
    Linear,
    MaxPool,
    Requantization,
    Rescale,
    Step,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a random adder layer or convolution is like."""

    channels: int
    filters: int
    window: Window = POINT
    groups: int = 1
    size: tuple[int, int] = (7, 7)
    quant_max: int = 255
    residual: bool = False
    terms: int = 1  # of adder layers


class Builder:
    """Appends random steps to a plan; factors are such that bytes spread over their whole range, and beyond it."""

    def __init__(self, channels: int, height: int, width: int, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.activations: list[Activation] = []
        self.steps: list[Step] = []
        self.activation(channels, height, width)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in ``[low, high)``."""
        return torch.randint(low, high, shape, generator=self.random).to(dtype)

    def activation(self, channels: int, height: int, width: int) -> int:
        """A new activation's number."""
        zero_point = self.integers(0, 256, channels, dtype=torch.uint8)
        self.activations.append(Activation(channels, height, width, 0.125, zero_point))
        return len(self.activations) - 1

    def requantization(
        self, filters: int, low: int, high: int, quant_max: int = 255, residual: int | None = None
    ) -> Requantization:
        """Factors that bring sums between ``low`` and ``high`` to bytes; signs of both kinds, some beyond the range."""
        shift = self.integers(20, 40, filters)
        signs = self.integers(0, 2, filters) * 2 - 1
        spread = max(high - low, 1)
        size = (
            (quant_max * 2.0**shift / spread * (0.5 + torch.rand(filters, generator=self.random)))
            .long()
            .clamp(max=2**31 - 1)
        )
        multiplier = size * signs
        middle = (low + high) // 2 + self.integers(-spread // 4 - 1, spread // 4 + 1, filters)
        offset = ((quant_max // 2) << shift) - multiplier * middle
        most = 7 - (quant_max.bit_length() - 1)
        return Requantization(
            multiplier.to(torch.int32),
            offset,
            shift.to(torch.uint8),
            self.integers(0, most + 1, filters, dtype=torch.uint8),
            quant_max,
            residual,
            None if residual is None else (size // 3).to(torch.int32),
        )

    def layer(
        self,
        cls: type[Adder] | type[Convolution],
        filters: int,
        window: Window,
        groups: int = 1,
        quant_max: int = 255,
        residual: int | None = None,
        input: int | None = None,
        terms: int = 1,
    ) -> int:
        """Append an adder layer or a convolution; returns the number of its output."""
        source = len(self.activations) - 1 if input is None else input
        before = self.activations[source]
        low, high = (0, 256) if cls is Adder else (-128, 128)
        shape = (filters, *([terms] * (terms > 1)), *window.kernel, before.channels // groups)
        weight = self.integers(low, high, *shape, dtype=cls.weight_dtype)
        count = window.kernel[0] * window.kernel[1] * before.channels // groups
        # Around the mean of the sums, a few of their standard deviations to each side.
        mean, spread = (85 * count, 60 * int(count**0.5) + 60) if cls is Adder else (0, 11000 * int(count**0.5) + 11000)
        mean, spread = mean * (2**terms - 1), spread * 2 ** (terms - 1)
        requantization = self.requantization(filters, mean - 3 * spread, mean + 3 * spread, quant_max, residual)
        target = self.activation(filters, *window.output_size(before.height, before.width))
        self.steps.append(cls(source, target, weight, window, groups, requantization))
        return target

    def rescale(self, residual: int | None = None) -> int:
        """Append a rescaling, perhaps with a residual."""
        source = len(self.activations) - 1
        before = self.activations[source]
        target = self.activation(before.channels, before.height, before.width)
        factors = self.requantization(before.channels, 0, 255, residual=residual)
        self.steps.append(Rescale(source, target, factors))
        return target

    def max_pool(self, window: Window, size: tuple[int, int] | None = None) -> int:
        """Append a max-pooling; ``size`` is the output's where it is rounded up."""
        source = len(self.activations) - 1
        before = self.activations[source]
        target = self.activation(before.channels, *(size or window.output_size(before.height, before.width)))
        self.activations[target] = dataclasses.replace(self.activations[target], zero_point=before.zero_point)
        self.steps.append(MaxPool(source, target, window))
        return target

    def average_pool(self, kernel: tuple[int, int], stride: tuple[int, int] | None = None) -> int:
        """Append an average pooling."""
        source = len(self.activations) - 1
        before = self.activations[source]
        window = Window(kernel, stride or kernel, (0, 0), (1, 1))
        target = self.activation(before.channels, *window.output_size(before.height, before.width))
        factors = self.requantization(before.channels, 0, 255 * kernel[0] * kernel[1])
        self.steps.append(AveragePool(source, target, window, factors))
        return target

    def linear(self, classes: int) -> None:
        """Append the classifier, on all pixels there are."""
        before = self.activations[-1]
        source = len(self.activations) - 1
        values = before.height * before.width * before.channels
        weight = self.integers(-128, 128, classes, values, dtype=torch.int8)
        multiplier = self.integers(-(2**31) + 1, 2**31, classes, dtype=torch.int32)
        offset = self.integers(-(2**40), 2**40, classes)
        shift = self.integers(24, 40, classes, dtype=torch.uint8)
        self.steps.append(Linear(source, weight, multiplier, offset, shift, 0.5))

    def plan(self) -> IntegerPlan:
        """What has been built."""
        paths = tuple(f"{step.kind}{index}" for index, step in enumerate(self.steps))
        return IntegerPlan(tuple(self.activations), tuple(self.steps), paths)

    def image(self, batch: int = 2) -> Tensor:
        """Random bytes for the network, ``[N, H, W, C]``."""
        first = self.activations[0]
        return self.integers(0, 256, batch, first.height, first.width, first.channels, dtype=torch.uint8)


def single(cls: type[Adder] | type[Convolution], layer: Layer, seed: int = 0) -> Builder:
    """A plan of one layer; with a residual, a rescaling of the input's size goes before it."""
    builder = Builder(layer.channels, *layer.size, seed)
    residual = None
    if layer.residual:
        residual = builder.layer(Convolution, layer.filters, layer.window, layer.groups)
    terms = layer.terms if cls is Adder else 1
    builder.layer(cls, layer.filters, layer.window, layer.groups, layer.quant_max, residual, input=0, terms=terms)
    return builder


def square(kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Window:
    """The same in both directions."""
    return Window((kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation))


def residual_network(seed: int = 0, size: tuple[int, int] = (23, 19), classes: int = 10, terms: int = 1) -> Builder:
    """A small ResNet: stem, max-pooling, blocks with and without a projection, depthwise, average, classifier.

    One 3x3 layer, the depthwise one and a projection have the given number of terms.
    """
    builder = Builder(3, *size, seed)
    builder.layer(Convolution, 16, square(7, 2, 3))
    shortcut = builder.max_pool(square(3, 2, 1))
    builder.layer(Adder, 16, square(3, padding=1), terms=terms)
    shortcut = builder.layer(Adder, 16, square(3, padding=1), residual=shortcut)
    builder.layer(Adder, 24, POINT)
    wide = builder.layer(Adder, 24, square(3, 2, 1), groups=24, terms=terms)
    projection = builder.layer(Adder, 40, square(1, 2), input=shortcut, terms=terms)
    builder.layer(Adder, 40, POINT, input=wide, residual=projection)
    builder.rescale(residual=projection)
    last = builder.activations[-1]
    builder.average_pool((last.height, last.width))
    builder.linear(classes)
    return builder


def plain_network(seed: int = 0, size: tuple[int, int] = (10, 9), classes: int = 7) -> Builder:
    """A small VGG, whose classifier reads several pixels."""
    builder = Builder(3, *size, seed)
    builder.layer(Convolution, 12, square(3, padding=1))
    builder.layer(Adder, 20, square(3, padding=1))
    builder.max_pool(square(3, 3))
    builder.linear(classes)
    return builder


LAYERS: dict[str, Layer] = {
    "pointwise": Layer(64, 64, size=(7, 7)),
    "pointwise-odd-channels": Layer(13, 17, size=(5, 9)),
    "pointwise-stride2": Layer(24, 40, square(1, 2), size=(9, 8)),
    "3x3": Layer(16, 32, square(3, padding=1), size=(8, 11)),
    "3x3-stride2": Layer(64, 24, square(3, 2, 1), size=(15, 14)),
    "3x3-dilated": Layer(12, 8, square(3, padding=2, dilation=2), size=(9, 9)),
    "5x3-asymmetric": Layer(7, 9, Window((5, 3), (2, 1), (1, 2), (1, 2)), size=(13, 10)),
    "7x7-stem": Layer(3, 16, square(7, 2, 3), size=(20, 18)),
    "one-channel": Layer(1, 5, square(3, padding=1), size=(6, 6)),
    "groups": Layer(32, 48, square(3, padding=1), groups=4, size=(7, 7)),
    "groups-of-three": Layer(9, 6, square(3), groups=3, size=(6, 5)),
    "depthwise": Layer(72, 72, square(3, 1, 1), groups=72, size=(10, 9)),
    "depthwise-stride2": Layer(33, 33, square(5, 2, 2), groups=33, size=(11, 12)),
    "depthwise-doubling": Layer(10, 20, square(3, 1, 1), groups=10, size=(6, 7)),
    "four-bits": Layer(16, 24, square(3, padding=1), quant_max=15, size=(7, 7)),
    "residual": Layer(16, 16, square(3, padding=1), residual=True, size=(7, 9)),
    "residual-six-bits": Layer(16, 20, POINT, quant_max=63, residual=True, size=(6, 6)),
    "many-channels": Layer(512, 16, square(3, padding=1), size=(4, 4)),
    "two-terms": Layer(16, 20, square(3, padding=1), size=(7, 9), terms=2),
    "two-terms-pointwise": Layer(24, 40, POINT, residual=True, size=(6, 7), terms=2),
    "three-terms-stride2": Layer(13, 17, square(3, 2, 1), size=(8, 9), terms=3),
    "three-terms-groups": Layer(9, 6, square(3), groups=3, quant_max=15, size=(6, 5), terms=3),
    "four-terms-wide-groups": Layer(32, 48, square(3, padding=1), groups=2, size=(5, 5), terms=4),
    "three-terms-depthwise": Layer(72, 72, square(5, 2, 2), groups=72, residual=True, size=(9, 8), terms=3),
    "two-terms-doubling": Layer(10, 20, square(3, 1, 1), groups=10, size=(6, 7), terms=2),
}
