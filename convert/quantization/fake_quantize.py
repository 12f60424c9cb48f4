"""Simulate an integer network in fp32, for calibration and for quantization-aware training.

Like a conversion, this changes the class of a model. The model keeps its modules, parameters and paths, and gains the
grids of its activations as buffers; its forward pass runs the fused operations that ``fusion.py`` cuts it into.
Rounding passes gradients straight through (Bengio et al., arXiv 1308.3432). The change is a transform in the model's
record.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_never

from ...adder_layers.geometry import terms_first
from ..calibration.batchnorm import affine_of
from ..errors import AdderkitError, CheckpointError
from ..graph.modes import device_of
from ..record import check_version, record_
from .config import QuantizeConfig
from .fused_ops import FusedGraph, FusedOp
from .fusion import fuse
from .grids import BYTE_BITS, Grid, signed_weights

FAKE_QUANTIZE = "fake_quantize"
VERSION = 1
_SIGNED_KINDS = ("convolution", "linear")  # with a step size for each filter


class ActivationGrid(nn.Module):
    """The grid of one activation as buffers.

    Args:
        channels: Number of channels.
        quant_max: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    scale_exponent: Tensor

    def __init__(self, channels: int, quant_max: int) -> None:
        super().__init__()
        self.quant_max = quant_max
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("scale_exponent", torch.zeros(channels, dtype=torch.float32))

    @property
    def grid(self) -> Grid:
        """The grid that the buffers hold."""
        return Grid(float(self.scale), self.zero_point, self.scale_exponent, self.quant_max)

    def set_(self, grid: Grid) -> None:
        """Copy a grid with the same number of channels and the same ``quant_max`` into the buffers."""
        self.scale.fill_(grid.scale)
        self.zero_point.copy_(grid.zero_point)
        self.scale_exponent.copy_(grid.scale_exponent)


class FakeQuantized(nn.Module):
    """Mixin that replaces a model's forward pass by one with fake-quantized operations.

    The attributes have names that no timm model uses, unlike ``stages`` or ``config``.

    Attributes:
        float_class: The model's class before the change.
        fused_graph: The operations of the forward pass.
        quantize_config: Bits, and what stays in fp32.
        quantization: An ``ActivationGrid`` for each quantized activation, by its number.
    """

    float_class: type[nn.Module]
    fused_graph: FusedGraph
    quantize_config: QuantizeConfig
    quantization: nn.ModuleDict

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[N, C, H, W]`` to logits ``[N, classes]``."""

        def visit(op: FusedOp, values: Mapping[int, Tensor]) -> Tensor:
            return self.quantize(op.output, compute_op(self, op, values))

        return self.fused_graph.run(self.quantize(0, images), visit).flatten(1)

    def float_model(self) -> nn.Module:
        """Return the model before the change, with the same modules and tensors."""
        model = copy.copy(self)
        model.__class__ = self.float_class  # type: ignore[assignment]
        return model

    def grid(self, number: int) -> Grid | None:
        """Return the grid of an activation; ``None`` for logits, and for an image that is not quantized."""
        key = str(self.fused_graph.grid_source(number))
        if key not in self.quantization:
            return None
        held: Any = self.quantization[key]
        grid: Grid = held.grid
        return grid

    def weight_grid(self, op: FusedOp) -> Grid | None:
        """Return the grid of a layer's input; ``None`` for layers that stay in fp32."""
        in_float = self.quantize_config.first_last == "fp32" and op.kind == "linear"
        return None if in_float else self.grid(op.input)

    def needs_shift(self, op: FusedOp) -> bool:
        """Return whether the gain after a layer's sums must be a power of two and its weights cannot make it one."""
        on_grid = str(op.output) in self.quantization
        return self.quantize_config.requant == "shift" and op.kind not in _SIGNED_KINDS and on_grid

    def quantize(self, number: int, values: Tensor) -> Tensor:
        """Round the values ``[N, C, H, W]`` of an activation to its grid; results of max-pooling are on it already."""
        grid = self.grid(number) if str(number) in self.quantization else None
        return values if grid is None else grid.nearest(values, (-1, 1, 1))


def fake_quantize_(model: nn.Module, config: QuantizeConfig, image: tuple[int, int, int] | None = None) -> None:
    """Change the class of a model to one that simulates an integer network, in place; the grids are not set yet.

    Args:
        model: The model to change.
        config: Bits, and what stays in fp32.
        image: ``(channels, height, width)``; by default what the model's timm configuration says.

    Raises:
        AdderkitError: Integers (or shifts, if they are asked for) cannot express the model, or it is fake-quantized
            already.
    """
    if isinstance(model, FakeQuantized):
        raise AdderkitError(
            "the model is prepared for quantization-aware training already: quantize it, or prepare its float network"
        )
    graph = fuse(model, image)
    if config.first_last == "fp32" and any(op.kind != "convolution" for op in graph.ops if 0 in op.reads):
        raise AdderkitError("the image is read by more than a convolution; expected one with --first-last fp32")
    if config.requant == "shift":
        _check_shifts(graph)
    cls, changed = type(model), cast("Any", model)
    changed.fused_graph, changed.quantize_config = graph, config
    changed.quantization = nn.ModuleDict(
        {
            str(number): ActivationGrid(graph.shapes[number][0], 2 ** activation_bits(graph, number, config) - 1)
            for number in graph.activations_with_grid()
            if number or config.first_last == "int8"
        }
    ).to(device_of(model))
    changed.__class__ = type(f"FakeQuantized{cls.__name__}", (FakeQuantized, cls), {"float_class": cls})
    record_(
        model,
        {"kind": FAKE_QUANTIZE, "version": VERSION, "image": list(graph.shapes[0]), "config": config.to_dict()},
    )


def _check_shifts(graph: FusedGraph) -> None:
    """Reject averages that shifts cannot bring to the step size of what they are added to, or are rescaled to.

    The step size of an average over ``t`` pixels is a power of two divided by ``t``, all others are powers of two. The
    layers that follow absorb the ``t`` in their weights or their BatchNorm.

    Raises:
        AdderkitError: The ratio of two step sizes is not a power of two.
    """
    pixels = [1] * len(graph.shapes)
    for op in graph.ops:
        own = math.prod(op.window.kernel) if op.kind == "average_pool" else 1
        pixels[op.output] = pixels[op.input] if op.kind == "max_pool" else own
        alone = not op.norms and op.kind in ("adder", "rescale", "average_pool")
        pairs = [(pixels[op.input], 1)] * alone
        pairs += [] if op.residual is None else [(pixels[op.residual], own)]
        for read, written in pairs:
            if _odd_part(read) != _odd_part(written):
                raise AdderkitError(
                    f"{op.path} adds or rescales averages over {max(read, written)} pixels, which shifts alone "
                    "cannot, expected a power of two: choose requant fixed (--requant fixed)"
                )


def _odd_part(number: int) -> int:
    return number // (number & -number)


def check_fake_quantize(transform: Mapping[str, Any]) -> None:
    """Reject a malformed ``fake_quantize`` transform.

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


def activation_bits(graph: FusedGraph, number: int, config: QuantizeConfig) -> int:
    """Return the bits of an activation: the configured ones if a layer between first and last reads it, else 8."""
    body = [op for op in graph.consumers(number) if op.input != 0 and op.kind != "linear"]
    return config.bits if body else BYTE_BITS


def weight_bits(op: FusedOp, config: QuantizeConfig) -> int:
    """Return the bits of a convolution's weights: 8 in the first layer and the classifier."""
    return BYTE_BITS if op.input == 0 or op.kind == "linear" else config.bits


def compute_op(model: nn.Module, op: FusedOp, values: Mapping[int, Tensor]) -> Tensor:
    """Compute an operation up to where its result is rounded; in a ``FakeQuantized`` model with its weights on grids.

    Args:
        model: The model whose modules compute; in any other model their weights stay as they are.
        op: The operation.
        values: Activations ``[N, C, H, W]`` by number.

    Returns:
        ``[N, O, H', W']``.
    """
    grid = model.weight_grid(op) if isinstance(model, FakeQuantized) else None
    result = compute_sums(model, op, values[op.input], grid)
    for path in op.norms:
        result = _normalize(model, op, model.get_submodule(path), result)
    if op.residual is not None:
        result = result + values[op.residual]
    return result.clamp(op.low, op.high) if op.clamps else result


def _normalize(model: Any, op: FusedOp, norm: Any, values: Tensor) -> Tensor:
    """Apply a BatchNorm; if only shifts requantize, with its gain rounded to the nearest one that a shift can give."""
    own_forward = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or not hasattr(norm, "act")
    # BatchNormAct2d's own forward would apply its activation as well.
    result: Tensor = norm(values) if own_forward else nn.BatchNorm2d.forward(norm, values)
    if not isinstance(model, FakeQuantized) or not model.needs_shift(op):
        return result
    source: Any = model.grid(op.input)
    target: Any = model.grid(op.output)
    variance = values.detach().var((0, 2, 3), unbiased=False) if norm.training else norm.running_var
    taps = math.prod(op.window.kernel) if op.kind == "average_pool" else 1
    factor = (variance + norm.eps).rsqrt() * (source.scale / taps / target.step_size)
    if not norm.affine:
        return result * _ratio(factor)[:, None, None]
    bias = norm.bias[:, None, None]
    shifted: Tensor = (result - bias) * _ratio(factor * norm.weight.detach().abs())[:, None, None] + bias
    return shifted


def _ratio(factor: Tensor) -> Tensor:
    """Return the nearest power of two of each factor divided by it; 1 for factors that are 0."""
    return torch.where(factor > 0, torch.exp2(factor.log2().round()) / factor, torch.ones_like(factor))


def compute_sums(model: nn.Module, op: FusedOp, source: Tensor, grid: Grid | None) -> Tensor:
    """Compute an operation before its normalization.

    Args:
        model: The model whose modules compute.
        op: The operation.
        source: ``[N, C, H, W]``.
        grid: Grid of the source, for the weights; ``None`` computes with the weights as they are.

    Returns:
        ``[N, O, H', W']``.
    """
    match op.kind:
        case "adder":
            return _adder_sums(model, op, source, grid)
        case "convolution" | "linear":
            return _convolution_sums(model, op, source, grid)
        case "average_pool":
            return F.avg_pool2d(source, op.window.kernel, op.window.stride)
        case "max_pool":
            pool: Any = model.get_submodule(op.path)
            return F.max_pool2d(source, *op.window, ceil_mode=pool.ceil_mode)
        case "rescale":
            return source
        case _:
            assert_never(op.kind)


def _adder_sums(model: nn.Module, op: FusedOp, source: Tensor, grid: Grid | None) -> Tensor:
    layer: Any = model.get_submodule(op.path)
    weight = window_weight(layer, op)
    if grid is None:
        return layer._conv_forward(source, weight, layer.bias)  # type: ignore[no-any-return]
    weight, excess = grid.weights(weight, op.groups)
    return layer._conv_forward(source, weight, layer.bias) - excess[:, None, None]  # type: ignore[no-any-return]


def _convolution_sums(model: nn.Module, op: FusedOp, source: Tensor, grid: Grid | None) -> Tensor:
    layer: Any = model.get_submodule(op.path)
    weight, window = window_weight(layer, op), op.window
    if grid is not None:
        assert isinstance(model, FakeQuantized)
        codes, step_size = quantize_filters(model, op, weight)
        weight = weight + (codes * step_size[:, None, None, None] - weight).detach()
    return F.conv2d(source, weight, layer.bias, window.stride, window.padding, window.dilation, op.groups)


def window_weight(layer: Any, op: FusedOp) -> Tensor:
    """Return a layer's weight as ``[O, C / groups, kh, kw]``, also that of a layer on a flattened activation.

    With T > 1 terms it is ``[O, C / groups, T, kh, kw]``.
    """
    weight: Tensor = layer.weight
    if weight.ndim == 5:
        terms = terms_first(weight)
        return terms.reshape(*terms.shape[:2], -1, *op.window.kernel).movedim(0, 2)
    return weight.reshape(len(weight), -1, *op.window.kernel)


def quantize_filters(model: FakeQuantized, op: FusedOp, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the filters of a convolution; if only shifts requantize, with step sizes coarse enough for that.

    Args:
        model: The model, for the grids and BatchNorms around the layer.
        op: The layer's operation.
        weight: The layer's weight ``[O, C / groups, kh, kw]``.

    Returns:
        Codes ``[O, C / groups, kh, kw]``, and the step size ``[O]`` of each filter. With shifts, the step size times
        the input's scale times the gain of the BatchNorms that follow is a power of two times the output's step size.
    """
    codes, step_size = signed_weights(weight, weight_bits(op, model.quantize_config))
    source, target = model.grid(op.input), model.grid(op.output)
    if model.quantize_config.requant != "shift" or source is None:
        return codes, step_size
    factor = source.scale * step_size.double().cpu()
    for path in op.norms:
        factor = factor * affine_of(model.get_submodule(path))[0].abs()
    if target is not None:
        factor = factor / target.step_size.double().cpu()
    ratio = torch.where(factor > 0, torch.exp2(factor.log2().ceil()) / factor, torch.ones_like(factor)).to(step_size)
    return (codes / ratio[:, None, None, None]).round(), step_size * ratio
