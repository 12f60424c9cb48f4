"""Import checkpoints of AdderNet's published code (huawei-noah/AdderNet) and of other adder libraries.

In those of the published code the parameter of an adder layer is called ``adder`` (and ``b``), names begin with
``module.``, the classifier is a 1x1 convolution, and a BatchNorm called ``bn2`` normalizes the logits. The names tell
which layers are adder layers. Libraries that call the parameter ``weight`` leave that to the user.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .checkpoint.allocation import AllocationLimit, count_elements
from .conversion.config import AdderConfig
from .conversion.plan import ConversionPlan
from .conversion.rewrite import convert_
from .errors import CheckpointError, NoModuleMatchedError
from .foreign_weights.loading import load_weights_
from .foreign_weights.names import without_prefix
from .foreign_weights.read import read_weights
from .model_source import ModelSource
from .models.cifar import CIFAR_MEAN, BasicBlock, CifarNet
from .patterns import matching, nearest_names

_LOGITS_NORM = "bn2"
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_EPSILON = 1e-5  # default of torch's BatchNorm, which the published code does not change
# Images that the published code trains on; the entry of the same name in timm may differ.
_CIFAR_IMAGES: dict[str, Any] = {"mean": CIFAR_MEAN, "std": (0.2023, 0.1994, 0.2010)}
_IMAGENET_IMAGES: dict[str, Any] = {
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "input_size": (3, 224, 224),
    "test_input_size": None,
    "crop_pct": 224 / 256,
    "test_crop_pct": None,
    "interpolation": "bilinear",
}
# The weights are not those that the entry in timm points to, nor under their license.
_FOREIGN: dict[str, Any] = {"url": "", "hf_hub_id": None, "tag": "", "license": None, "origin_url": None}


def import_checkpoint(
    path: str | Path, name: str, num_classes: int | None = None, adder_layers: Sequence[str] = ()
) -> tuple[nn.Module, ConversionPlan]:
    """Build a model with the weights from a checkpoint of AdderNet's published code, or of another adder library.

    Args:
        path: File with the state dict: safetensors, or a PyTorch file that holds only tensors.
        name: Name of the same network in timm: ``resnet50``, ``cifar_resnet20``, …
        num_classes: Number of classes; by default that of the checkpoint's classifier.
        adder_layers: Patterns of the adder layers, for a file that calls their parameters ``weight`` and ``bias``.

    Returns:
        The adder network in evaluation mode, and the plan of its conversion.

    Raises:
        CheckpointError: The file is damaged, holds no adder layer, or belongs to another network.
        NoModuleMatchedError: A pattern matches no convolution.
        ModelSourceError: The name is unknown.
    """
    file = read_weights(path)
    weights = without_prefix(file.tensors)
    found = _classes(weights)
    if num_classes is not None and found is not None and found != num_classes:
        raise CheckpointError(f"{path} has {found} classes, expected the {num_classes} of --num-classes")
    images = _CIFAR_IMAGES if name.startswith("cifar_") else _IMAGENET_IMAGES
    source = ModelSource(name, pretrained=False, num_classes=num_classes or found)
    with AllocationLimit(count_elements(weights), str(path)):
        model = source.build(pretrained_cfg_overlay={**images, **_FOREIGN})
    weights = _renamed(weights, model)
    adders = {key.removesuffix(".adder") for key in weights if key.endswith(".adder")}
    adders |= _matched(model, adder_layers)
    if not adders:
        raise CheckpointError(
            f"{path} holds no parameter called 'adder', expected a checkpoint of AdderNet's published code; name the "
            "adder layers of another library's file with --adder-layers PATTERN, or, to convert weights of a CNN, "
            f"run: adderkit convert --model {name} --checkpoint {path}"
        )
    plan = _convert(model, sorted(adders), name, path)
    for adder in adders:
        for theirs, ours in (("adder", "weight"), ("b", "bias")):
            if f"{adder}.{theirs}" in weights:
                weights[f"{adder}.{ours}"] = weights.pop(f"{adder}.{theirs}")
    weights = _with_our_classifier(weights, model, path)
    load_weights_(model, name, dataclasses.replace(file, tensors=weights))
    return model, plan


def _matched(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the convolutions that patterns match; each has to match one."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for pattern in patterns:
        if not any(matching((pattern,), path) for path in paths):
            near = ", ".join(map(repr, nearest_names(pattern, paths)))
            raise NoModuleMatchedError(
                f"--adder-layers {pattern!r} matches none of {len(paths)} convolutions"
                + (f"; did you mean {near}?" if near else "; expected a path, a glob such as 'layer4.*' or 're:…'")
            )
    return {path for path in paths if matching(patterns, path)}


def _classes(weights: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes by the rows of the classifier, called ``fc`` as in timm's networks."""
    weight = weights.get("fc.weight")
    return None if weight is None or weight.ndim < 2 or not weight.shape[0] else weight.shape[0]


def _renamed(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of the published small ResNet; those of its ResNet-50 are named as in timm."""
    blocks = sum(isinstance(module, BasicBlock) for module in model.modules()) // 3
    if not isinstance(model, CifarNet) or not blocks:
        return dict(weights)
    prefixes = {"conv1": "features.0.0", "bn1": "features.0.1", _LOGITS_NORM: "fc_norm"}
    prefixes |= {
        f"layer{stage + 1}.{block}": f"features.{1 + stage * blocks + block}"
        for stage in range(3)
        for block in range(blocks)
    }
    pattern = re.compile(rf"({'|'.join(map(re.escape, prefixes))})\.")
    return {
        pattern.sub(lambda match: f"{prefixes[match[1]]}.", key, count=1) if pattern.match(key) else key: value
        for key, value in weights.items()
    }


def _convert(model: nn.Module, adders: Iterable[str], name: str, path: str | Path) -> ConversionPlan:
    """Convert exactly the layers that the checkpoint names to adder layers."""
    modules = dict(model.named_modules())
    for adder in adders:  # before names are used as patterns
        if not isinstance(modules.get(adder), nn.Conv2d):
            raise CheckpointError(f"{path} is not a checkpoint of {name}: {adder:.80} is not a convolution there")
    config = AdderConfig(include=tuple(adders), skip_first=False, skip_last=False, skip_gates=False, norm="skip")
    try:
        plan = convert_(model, config)
    except NoModuleMatchedError as error:
        raise CheckpointError(f"{path} is not a checkpoint of {name}: {error}") from error
    left = [row for row in plan.rows if row.path in adders and row.decision != "convert"]
    if left:
        raise CheckpointError(
            f"{left[0].path} is an adder layer in {path}, but cannot be one in {name}: {left[0].reason}"
        )
    return plan


def _with_our_classifier(weights: dict[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Fold a classifier that is a 1x1 convolution followed by a BatchNorm into one linear layer.

    In evaluation ``γ · (W x + b - μ) / √(σ² + ε) + β`` is the linear layer ``(s W) x + (s (b - μ) + β)`` with
    ``s = γ / √(σ² + ε)``; this is computed in fp64.
    """
    classifier = getattr(model, "fc", None)
    weight = weights.get("fc.weight")
    if not isinstance(classifier, nn.Linear) or weight is None:
        return weights
    weight, dtype = weight.flatten(1).double(), weight.dtype
    bias = weights.get("fc.bias", weight.new_zeros(len(weight))).double()
    norm = {key: weights[f"{_LOGITS_NORM}.{key}"] for key in _NORM_TENSORS if f"{_LOGITS_NORM}.{key}" in weights}
    if norm:
        if len(norm) != len(_NORM_TENSORS) or any(tensor.shape != bias.shape for tensor in norm.values()):
            raise CheckpointError(f"{_LOGITS_NORM} is not a BatchNorm of {len(bias)} logits in {path}")
        scale, shift, mean, variance = (tensor.double() for tensor in norm.values())
        scale = scale / (variance + _EPSILON).sqrt()
        weight, bias = weight * scale[:, None], (bias - mean) * scale + shift
    kept = {key: value for key, value in weights.items() if key.rpartition(".")[0] != _LOGITS_NORM}
    return kept | {"fc.weight": weight.to(dtype), "fc.bias": bias.to(dtype)}
