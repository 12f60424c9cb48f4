"""A float network becomes an integer network, from unlabeled images; and the record that rebuilds it."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..calibration.batchnorm import affine_of, reestimate_batchnorm_
from ..calibration.batchnorm_shift import calibration_statistics
from ..calibration.calibrate import batches_of
from ..calibration.config import CalibrationConfig
from ..errors import AdderkitError
from ..graph.modes import eval_mode
from ..record import record_, require_float_weights, set_transforms_, transforms_of
from .config import QuantizeConfig
from .fake_quantize import FAKE_QUANTIZE, FakeQuantized, fake_quantize_
from .fold import fold
from .fusion import Stage
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
    """Make an integer network of an adder network, a hybrid or a CNN. No labels are needed; the model is left as it is.

    Ranges are chosen layer by layer (``ranges.py``), BatchNorm is measured in the quantized network so that it
    does with the images what it does in the model (``batchnorm_shift.py``), and folded. A model that was trained with
    quantization keeps the ranges of its training.

    Args:
        model: A model in evaluation mode that runs on images of the size in its timm configuration.
        images: ``[N, C, H, W]`` normalized as the model expects, or batches of such. A few hundred do.
        config: Bits, and what stays in fp32; of a model trained with quantization, that of its training counts.
        memory: Bytes that activations of the images may take while ranges are chosen.

    Returns:
        An ``IntegerNetwork``.

    Raises:
        AdderkitError: Integers cannot express the model, or there are too few images.
    """
    return quantize_with_ranges(model, images, config, memory=memory)[0]


def quantize_with_ranges(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    memory: int = CalibrationConfig.memory,
) -> tuple[IntegerNetwork, list[Range]]:
    """See ``quantize``; also the ranges that were chosen, none for a model that had them."""
    require_float_weights(model, "quantized again", "quantize the network that it was made from")
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
    """Change a model to one that computes in fp32 what it would in integers, in place, ranges and statistics set.

    Raises:
        AdderkitError: Integers cannot express the model.
    """
    original = copy.deepcopy(model)
    image: Any = tuple(batches[0].shape[1:])
    fake_quantize_(model, config, image)
    assert isinstance(model, FakeQuantized)
    count = min(images_that_fit(model._stages, memory), sum(map(len, batches)))
    with eval_mode(model, original), calibration_statistics(model, original, batches):
        ranges = set_ranges_(model, original, torch.cat(list(batches))[:count])
        reestimate_batchnorm_(model, batches)
    return ranges


def _network(model: nn.Module, twin: FakeQuantized) -> IntegerNetwork:
    plan = fold(twin)
    stages = twin._stages.stages
    in_float = twin._quantize_config.first_last == "fp32"
    stem = _stem(twin, next(stage for stage in stages if 0 in stage.reads)) if in_float else None
    head = _head(twin, stages[-1]) if in_float and stages[-1].kind == "linear" else None
    network: Any = IntegerNetwork(plan, stem, head)
    set_transforms_(network, [done for done in transforms_of(model) if done["kind"] != FAKE_QUANTIZE])
    record_(network, quantize_transform(network, twin._quantize_config))
    for name in ("pretrained_cfg", "default_cfg", "_model_args", "num_classes"):
        if hasattr(model, name):
            setattr(network, name, copy.deepcopy(getattr(model, name)))
    return network  # type: ignore[no-any-return]


def _affine_of(model: FakeQuantized, stage: Stage, outputs: int) -> tuple[Tensor, Tensor]:
    """Gain and shift ``[O]`` of the normalizations behind a layer that stays in fp32."""
    gain, shift = torch.ones(outputs, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
    for path in stage.norms:
        factor, bias = affine_of(model.get_submodule(path))
        gain, shift = gain * factor, shift * factor + bias
    return gain.float(), shift.float()


@torch.no_grad()
def _stem(model: FakeQuantized, stage: Stage) -> nn.Conv2d:
    """The first convolution with its BatchNorm; what an activation clamps, the bytes behind it clamp."""
    layer = model.get_submodule(stage.path)
    assert isinstance(layer, nn.Conv2d)
    gain, shift = _affine_of(model, stage, layer.out_channels)
    window = stage.window
    folded = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        window.kernel,
        window.stride,
        window.padding,
        window.dilation,
        stage.groups,
    )
    folded.weight.copy_(layer.weight * gain[:, None, None, None])
    assert folded.bias is not None
    folded.bias.copy_(shift if layer.bias is None else shift + gain * layer.bias)
    return folded.requires_grad_(False)


@torch.no_grad()
def _head(model: FakeQuantized, stage: Stage) -> nn.Linear:
    layer = model.get_submodule(stage.path)
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight = layer.weight.flatten(1)
    gain, shift = _affine_of(model, stage, len(weight))
    folded = nn.Linear(weight.shape[1], len(weight))
    folded.weight.copy_(weight * gain[:, None])
    folded.bias.copy_(shift if layer.bias is None else shift + gain * layer.bias)
    return folded.requires_grad_(False)
