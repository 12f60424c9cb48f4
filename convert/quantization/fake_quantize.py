"""A model that computes in fp32 what it would compute in integers: for calibration, and for training with quantization.

Like a conversion this is a change of class. The model keeps its modules, parameters and paths, and gains the grids of
its activations as buffers; its forward pass goes through the stages that ``fusion.py`` cut it into. Rounding
passes the gradient straight through (Bengio et al., arXiv 1308.3432). The change is a transform in the model's record.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.batchnorm import affine_of
from ..errors import AdderkitError, CheckpointError
from ..record import check_version, record_
from .config import QuantizeConfig
from .fusion import Stage, Stages, stages_of
from .grids import BYTE_BITS, Grid, signed_weights

FAKE_QUANTIZE = "fake_quantize"
VERSION = 1
_SIGNED_KINDS = ("convolution", "linear")  # with a step for each filter


class ActivationGrid(nn.Module):
    """The grid of one activation as buffers.

    Args:
        channels: Number of channels.
        levels: Largest code.
    """

    scale: Tensor
    zero: Tensor
    exponent: Tensor

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("exponent", torch.zeros(channels, dtype=torch.float32))

    @property
    def grid(self) -> Grid:
        """What the buffers say."""
        return Grid(float(self.scale), self.zero, self.exponent, self.levels)

    def set_(self, grid: Grid) -> None:
        """Take over a grid of the same channels and levels."""
        self.scale.fill_(grid.scale)
        self.zero.copy_(grid.zero)
        self.exponent.copy_(grid.exponent)


class FakeQuantized(nn.Module):
    """What a model becomes: the class it was, with another forward pass."""

    quantization: nn.ModuleDict
    _stages: Stages
    _quantize_config: QuantizeConfig

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        values = {0: self.quantize(0, images)}
        last = {number: index for index, stage in enumerate(self._stages.stages) for number in stage.reads}
        for index, stage in enumerate(self._stages.stages):
            values[stage.output] = self.quantize(stage.output, carry_out(self, stage, values))
            for number in stage.reads:
                if last[number] == index:
                    values.pop(number, None)
        return values[self._stages.stages[-1].output].flatten(1)

    def in_floats(self) -> nn.Module:
        """The model that it was, with the same modules and tensors."""
        model = copy.copy(self)
        model.__class__ = type(self).__bases__[1]
        return model

    def grid(self, number: int) -> Grid | None:
        """Grid of an activation; ``None`` for logits, and for an image that is not quantized."""
        key = str(source_of_grid(self._stages, number))
        if key not in self.quantization:
            return None
        held: Any = self.quantization[key]
        grid: Grid = held.grid
        return grid

    def weight_grid(self, stage: Stage) -> Grid | None:
        """Grid of a layer's input; ``None`` for layers that stay in fp32."""
        in_float = self._quantize_config.first_last == "fp32" and stage.kind == "linear"
        return None if in_float else self.grid(stage.input)

    def shifts(self, stage: Stage) -> bool:
        """Whether the gain behind a layer's sums has to be a power of two that its weights cannot make it."""
        on_grid = str(stage.output) in self.quantization
        return self._quantize_config.requant == "shift" and stage.kind not in _SIGNED_KINDS and on_grid

    def quantize(self, number: int, values: Tensor) -> Tensor:
        """Values ``[N, C, H, W]`` of an activation on its grid; those that max-pooling gives are on it already."""
        grid = self.grid(number) if str(number) in self.quantization else None
        return values if grid is None else grid.nearest(values, (-1, 1, 1))


def fake_quantize_(model: nn.Module, config: QuantizeConfig, image: tuple[int, int, int] | None = None) -> None:
    """Change a model's class to one that computes as in integers, in place; the grids are still to be set.

    Args:
        model: The model to change.
        config: Bits, and what stays in fp32.
        image: ``(channels, height, width)``; by default what the model's timm configuration says.

    Raises:
        AdderkitError: Integers (or shifts, where they are asked for) cannot express the model, or it is quantized
            already.
    """
    if isinstance(model, FakeQuantized):
        raise AdderkitError("the model is trained for integers already; its ranges are those it was trained with")
    stages = stages_of(model, image)
    if config.first_last == "fp32" and any(stage.kind != "convolution" for stage in stages.stages if 0 in stage.reads):
        raise AdderkitError("the image is read by more than a convolution; expected one with --first-last fp32")
    if config.requant == "shift":
        _check_shifts(stages)
    modules: Any = model
    modules._stages, modules._quantize_config = stages, config
    modules.quantization = nn.ModuleDict(
        {
            str(number): ActivationGrid(stages.shapes[number][0], 2 ** bits_of(stages, number, config) - 1)
            for number in gridded(stages)
            if number or config.first_last == "int8"
        }
    )
    modules.__class__ = type(type(model).__name__, (FakeQuantized, type(model)), {})
    record_(
        model,
        {"kind": FAKE_QUANTIZE, "version": VERSION, "image": list(stages.shapes[0]), "config": config.to_dict()},
    )


def _check_shifts(stages: Stages) -> None:
    """Refuse averages that shifts cannot bring to the step of what they are added to, or are rescaled to.

    The step of an average over ``t`` pixels is a power of two divided by ``t``, all others are powers of two. Layers
    behind it take the ``t`` into their weights or their BatchNorm.

    Raises:
        AdderkitError: Where the two are not a power of two apart.
    """
    pixels = [1] * len(stages.shapes)
    for stage in stages.stages:
        own = math.prod(stage.window.kernel) if stage.kind == "average_pool" else 1
        pixels[stage.output] = pixels[stage.input] if stage.kind == "max_pool" else own
        alone = not stage.norms and stage.kind in ("adder", "rescale", "average_pool")
        pairs = [(pixels[stage.input], 1)] * alone
        pairs += [] if stage.residual is None else [(pixels[stage.residual], own)]
        for read, written in pairs:
            if _odd_part(read) != _odd_part(written):
                raise AdderkitError(
                    f"{stage.path} adds or rescales averages over {max(read, written)} pixels, which shifts alone "
                    "cannot, expected a power of two: take requant fixed (--requant fixed)"
                )


def _odd_part(number: int) -> int:
    return number // (number & -number)


def check_fake_quantize(transform: Mapping[str, Any]) -> None:
    """Refuse a malformed ``fake_quantize`` transform.

    Raises:
        CheckpointError: The version is unknown, or the image size or the configuration is missing.
    """
    check_version(transform, VERSION)
    config, image = transform.get("config"), transform.get("image")
    sizes = isinstance(image, list) and len(image) == 3 and all(type(size) is int and size > 0 for size in image)
    if not isinstance(config, Mapping) or not sizes:
        raise CheckpointError(
            f"the {FAKE_QUANTIZE!r} transform is {transform!r:.80}, expected an image size and a configuration"
        )


def apply_fake_quantize_(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Apply a checked ``fake_quantize`` transform to a model, in place; the grids come with the weights.

    Raises:
        CheckpointError: The configuration is malformed, or integers cannot express the model.
    """
    try:
        fake_quantize_(model, QuantizeConfig.from_dict(transform["config"]), tuple(transform["image"]))
    except AdderkitError as error:
        raise CheckpointError(f"the {FAKE_QUANTIZE!r} transform does not fit the model: {error}") from error


def gridded(stages: Stages) -> list[int]:
    """Activations with a grid of their own: all but the logits, and but what max-pooling writes."""
    pooled = {stage.output for stage in stages.stages if stage.kind == "max_pool"}
    logits = {stage.output for stage in stages.stages if stage.kind == "linear"}
    return [number for number in range(len(stages.shapes)) if number not in pooled | logits]


def source_of_grid(stages: Stages, number: int) -> int:
    """The activation whose grid this one has: behind max-pooling it is the pool's input."""
    for stage in stages.stages:
        if stage.output == number and stage.kind == "max_pool":
            return source_of_grid(stages, stage.input)
    return number


def bits_of(stages: Stages, number: int, config: QuantizeConfig) -> int:
    """Bits of an activation: the configuration's where a layer between the first and the last reads it, else 8."""
    body = [stage for stage in stages.consumers(number) if stage.input != 0 and stage.kind != "linear"]
    return config.bits if body else BYTE_BITS


def weight_bits(stage: Stage, config: QuantizeConfig) -> int:
    """Bits of a convolution's weights: 8 in the first layer and the classifier."""
    return BYTE_BITS if stage.input == 0 or stage.kind == "linear" else config.bits


def carry_out(model: nn.Module, stage: Stage, values: Mapping[int, Tensor]) -> Tensor:
    """What a stage computes before its result is rounded: in a ``FakeQuantized`` model with its weights on grids.

    Args:
        model: Its modules; in any other model they compute as they are.
        stage: The stage.
        values: Activations ``[N, C, H, W]`` by number.

    Returns:
        ``[N, O, H', W']``.
    """
    grid = model.weight_grid(stage) if isinstance(model, FakeQuantized) else None
    result = sums(model, stage, values[stage.input], grid)
    for path in stage.norms:
        result = _normalized(model, stage, model.get_submodule(path), result)
    if stage.residual is not None:
        result = result + values[stage.residual]
    return result.clamp(stage.low, stage.high) if (stage.low, stage.high) != (-math.inf, math.inf) else result


def _normalized(model: Any, stage: Stage, norm: Any, values: Tensor) -> Tensor:
    """Sums behind a BatchNorm; where only shifts requantize, its gain is the nearest one that a shift can give."""
    own_forward = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or not hasattr(norm, "act")
    # BatchNormAct2d's own forward would apply its activation as well.
    result: Tensor = norm(values) if own_forward else nn.BatchNorm2d.forward(norm, values)
    if not isinstance(model, FakeQuantized) or not model.shifts(stage):
        return result
    source: Any = model.grid(stage.input)
    target: Any = model.grid(stage.output)
    variance = values.detach().var((0, 2, 3), unbiased=False) if norm.training else norm.running_var
    taps = math.prod(stage.window.kernel) if stage.kind == "average_pool" else 1
    factor = (variance + norm.eps).rsqrt() * (source.scale / taps / target.step)
    if not norm.affine:
        return result * _ratio(factor)[:, None, None]
    bias = norm.bias[:, None, None]
    shifted: Tensor = (result - bias) * _ratio(factor * norm.weight.detach().abs())[:, None, None] + bias
    return shifted


def _ratio(factor: Tensor) -> Tensor:
    """What takes factors to the nearest power of two; 1 where they are 0."""
    return torch.where(factor > 0, torch.exp2(factor.log2().round()) / factor, torch.ones_like(factor))


def sums(model: nn.Module, stage: Stage, source: Tensor, grid: Grid | None) -> Tensor:
    """What a stage computes before normalization.

    Args:
        model: Its modules.
        stage: The stage.
        source: ``[N, C, H, W]``.
        grid: Of the source, for the weights; ``None`` computes with the weights as they are.

    Returns:
        ``[N, O, H', W']``.
    """
    window = stage.window
    if stage.kind == "max_pool":
        pool: Any = model.get_submodule(stage.path)
        return F.max_pool2d(source, *window, ceil_mode=pool.ceil_mode)
    if stage.kind == "average_pool":
        return F.avg_pool2d(source, window.kernel, window.stride)
    if stage.kind == "rescale":
        return source
    layer: Any = model.get_submodule(stage.path)
    weight = layer.weight.reshape(len(layer.weight), -1, *window.kernel)  # as it is, or of a flattened activation
    if stage.kind == "adder":
        if grid is None:
            return layer._conv_forward(source, weight, layer.bias)  # type: ignore[no-any-return]
        weight, excess = grid.weights(weight, stage.groups)
        return layer._conv_forward(source, weight, layer.bias) - excess[:, None, None]  # type: ignore[no-any-return]
    if grid is not None:
        assert isinstance(model, FakeQuantized)
        codes, step = filters_of(model, stage, weight)
        weight = weight + (codes * step[:, None, None, None] - weight).detach()
    return F.conv2d(source, weight, layer.bias, window.stride, window.padding, window.dilation, stage.groups)


def filters_of(model: FakeQuantized, stage: Stage, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's filters in whole numbers; where only shifts requantize, in steps coarse enough for that.

    Args:
        model: With the grids and BatchNorms around the layer.
        stage: The layer's.
        weight: Its weight ``[O, C / groups, kh, kw]``.

    Returns:
        Codes ``[O, C / groups, kh, kw]``, and the step ``[O]`` of each filter: with the input's scale and the gain of
        the BatchNorms behind it a power of two times the output's step.
    """
    codes, step = signed_weights(weight, weight_bits(stage, model._quantize_config))
    source, target = model.grid(stage.input), model.grid(stage.output)
    if model._quantize_config.requant != "shift" or source is None:
        return codes, step
    factor = source.scale * step.double().cpu()
    for path in stage.norms:
        factor = factor * affine_of(model.get_submodule(path))[0].abs()
    if target is not None:
        factor = factor / target.step.double().cpu()
    ratio = torch.where(factor > 0, torch.exp2(factor.log2().ceil()) / factor, torch.ones_like(factor)).to(step)
    return (codes / ratio[:, None, None, None]).round(), step * ratio
