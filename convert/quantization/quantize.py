"""Post-training quantization of a float network to an integer-only network, using unlabeled images."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..calibration.batchnorm import affine_of, reestimate_batchnorm_
from ..calibration.batchnorm_shift import calibration_statistics
from ..calibration.config import CalibrationConfig
from ..conversion.targets import require_support
from ..errors import AdderkitError
from ..graph.layers import is_feature_extractor
from ..graph.modes import batches_of, eval_mode, move_like
from ..record import record_, require_float_weights, set_transforms_, transforms_of
from ..wrappers import unwrapped
from .config import QuantizeConfig
from .fake_quantize import FAKE_QUANTIZE, FakeQuantized, fake_quantize_
from .fold import fold
from .fused_ops import FusedOp
from .ranges import Range, images_that_fit, set_ranges_
from .record import quantize_transform

_LEAST_IMAGES = 16


def quantize(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    memory: int = CalibrationConfig.memory,
) -> nn.Module:
    """Quantize an adder network, a hybrid or a CNN to an integer network. No labels are needed.

    The ranges of activations are chosen layer by layer. BatchNorm statistics are re-estimated in the quantized network,
    so that each BatchNorm has the same effect on the images as in the model, and folded. A model from
    quantization-aware training keeps the ranges that it was trained with.

    Args:
        model: A model that runs on images of the size in its timm configuration; it is not changed.
        images: ``[N, C, H, W]`` normalized as the model expects, or batches of such images. A few hundred are enough.
        config: Bits, and what stays in fp32. Ignored for a model from quantization-aware training, which has its own.
        memory: Bytes that the activations of the images may take while ranges are chosen.

    Returns:
        An ``IntegerNetwork`` on the CPU, which maps images ``[N, C, H, W]`` to logits ``[N, classes]``.

    Raises:
        AdderkitError: Integers cannot express the model, or there are too few images.

    Example:
        >>> model = adderkit.load("runs/resnet20-adder")
        >>> network = adderkit.quantize(model, images)
        >>> logits = network(images[:8])
        >>> adderkit.save(network, "runs/resnet20-int8")
    """
    return quantize_with_ranges(model, images, config, memory=memory)[0]


def require_logits(model: nn.Module) -> None:
    """Refuse a feature extractor.

    Raises:
        AdderkitError: The model returns feature maps.
    """
    if is_feature_extractor(model):
        raise AdderkitError("the model is a feature extractor, expected a classifier: integer networks return logits")


def quantize_with_ranges(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    memory: int = CalibrationConfig.memory,
) -> tuple[IntegerNetwork, list[Range]]:
    """Quantize a model as ``quantize`` does, and also return the ranges that were chosen.

    Args:
        model: A model that runs on images of the size in its timm configuration; it is not changed.
        images: ``[N, C, H, W]`` normalized as the model expects, or batches of such images.
        config: Bits, and what stays in fp32.
        memory: Bytes that the activations of the images may take while ranges are chosen.

    Returns:
        The network, and its ranges: an empty list for a model from quantization-aware training.

    Raises:
        AdderkitError: Integers cannot express the model, or there are too few images.
    """
    model = unwrapped(model)
    require_float_weights(model, "quantized again", "quantize the network that it was made from")
    require_logits(model)
    batches = batches_of(images, 64)
    count = sum(map(len, batches))
    if count < _LEAST_IMAGES:
        raise AdderkitError(f"{count} calibration images are too few, expected at least {_LEAST_IMAGES}")
    twin, ranges = copy.deepcopy(model).requires_grad_(False).eval(), []
    if isinstance(twin, FakeQuantized):
        reestimate_batchnorm_(twin, batches)
    else:
        ranges = prepare_(twin, batches, config, memory)
    assert isinstance(twin, FakeQuantized)
    return _network(model, twin), ranges


def prepare_(
    model: nn.Module, batches: Sequence[Tensor], config: QuantizeConfig, memory: int = CalibrationConfig.memory
) -> list[Range]:
    """Change a model to one that simulates an integer network in fp32, in place, with ranges and statistics set.

    Args:
        model: The model to change.
        batches: Images ``[N, C, H, W]`` normalized as the model expects.
        config: Bits, and what stays in fp32.
        memory: Bytes that the activations of the images may take while ranges are chosen.

    Returns:
        The range of each activation.

    Raises:
        AdderkitError: Integers cannot express the model.
    """
    require_support(model, "quantization", "quantize the CNN that it was converted from")
    original = copy.deepcopy(model)
    image: Any = tuple(batches[0].shape[1:])
    fake_quantize_(model, config, image)
    assert isinstance(model, FakeQuantized)
    count = min(images_that_fit(model.fused_graph, memory), sum(map(len, batches)))
    with eval_mode(model, original), calibration_statistics(model, original, batches):
        ranges = set_ranges_(model, original, move_like(torch.cat(list(batches))[:count], model))
        reestimate_batchnorm_(model, batches)
    return ranges


def _network(model: nn.Module, twin: FakeQuantized) -> IntegerNetwork:
    plan = fold(twin)
    ops = twin.fused_graph.ops
    in_float = twin.quantize_config.first_last == "fp32"
    stem = _stem(twin, next(op for op in ops if 0 in op.reads)) if in_float else None
    head = _head(twin, ops[-1]) if in_float and ops[-1].kind == "linear" else None
    network: Any = IntegerNetwork(plan, stem, head)
    set_transforms_(network, [done for done in transforms_of(model) if done["kind"] != FAKE_QUANTIZE])
    record_(network, quantize_transform(network, twin.quantize_config))
    for name in ("pretrained_cfg", "default_cfg", "_model_args", "num_classes"):
        if hasattr(model, name):
            setattr(network, name, copy.deepcopy(getattr(model, name)))
    return network  # type: ignore[no-any-return]


def _normalization_of(model: FakeQuantized, op: FusedOp, outputs: int) -> tuple[Tensor, Tensor]:
    """Return the gain and shift ``[O]`` of the normalizations after a layer that stays in fp32."""
    gain, shift = torch.ones(outputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
    for path in op.norms:
        factor, bias = affine_of(model.get_submodule(path))
        gain, shift = gain * factor, shift * factor + bias
    return gain.float(), shift.float()


@torch.no_grad()
def _stem(model: FakeQuantized, op: FusedOp) -> nn.Conv2d:
    """Return the first convolution with its BatchNorm folded in; its activation is the clamp to the plan's bytes."""
    layer = model.get_submodule(op.path)
    assert isinstance(layer, nn.Conv2d)
    gain, shift = _normalization_of(model, op, layer.out_channels)
    window = op.window
    folded = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        op.groups,
    )
    folded.weight.copy_(layer.weight.cpu() * gain[:, None, None, None])
    assert folded.bias is not None
    folded.bias.copy_(shift if layer.bias is None else shift + gain * layer.bias.cpu())
    return folded.requires_grad_(False)


@torch.no_grad()
def _head(model: FakeQuantized, op: FusedOp) -> nn.Linear:
    """Return the classifier as a linear layer, with its BatchNorm folded in."""
    layer = model.get_submodule(op.path)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight = layer.weight.flatten(1).cpu()
    gain, shift = _normalization_of(model, op, len(weight))
    folded = nn.Linear(weight.shape[1], len(weight))
    folded.weight.copy_(weight * gain[:, None])
    folded.bias.copy_(shift if layer.bias is None else shift + gain * layer.bias.cpu())
    return folded.requires_grad_(False)
