"""Fit all adder layers together, without labels, so that the output of each block matches the original's.

A fit of single layers takes the errors of the layers before as given, and the errors add up. Here the whole network is
trained for a few hundred steps to reproduce the teacher's activations after each block (after the residual addition, if
there is one) and its outputs: class probabilities, or the feature maps of a backbone. BRECQ (arXiv 2102.05426) matches
blocks for the same reason.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import adder_layers, sharp_gradient
from ..errors import AdderkitError
from ..graph.hooks import hooked
from ..graph.layers import Layer, trace_layers
from ..graph.modes import eval_mode, move_like
from ..graph.observe import returned_tensors
from .batchnorm import updating_statistics
from .config import CalibrationConfig

BATCH, LEAST_BATCH = 64, 8
WARM_UP = 10
# Tensors of a layer's output size that a training step holds: the outputs of the layer, its normalization and its
# activation, and a gradient.
KEPT = 4
# Adam's learning rate for adder weights, in units of each layer's standard deviation, and for BatchNorms. Higher rates
# learn the calibration images by heart: with 0.01 for weights, ResNet-20 on CIFAR-10 agreed with its CNN on all images
# that it was fitted to, but on 85.1 % of new ones, of 88.3 % before the joint fit.
WEIGHT_RATE, NORM_RATE = 0.003, 0.001
# Gives nearly the true derivative of the distance; as a power of two, it does not change the output by a single bit.
SHARPNESS = 1024.0


class Outputs(NamedTuple):
    """Results of a forward pass.

    Args:
        blocks: Outputs of blocks by path.
        returned: What the model returned: logits ``[N, classes]``, or any nesting of lists and dicts of tensors, such
            as the feature maps ``[N, C, H, W]`` of a backbone.
    """

    blocks: dict[str, Tensor]
    returned: Any


def block_paths(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the modules whose outputs are compared, in order of execution.

    For each adder layer this is the innermost enclosing module that is not a plain container, such as a residual block.
    A layer without such a module is compared after its normalization.

    Args:
        model: The converted model.
        layers: The adder layers of the model, in order of execution.
    """
    found: dict[str, None] = {}
    for layer in layers:
        parent = layer.path.rpartition(".")[0]
        while parent and isinstance(model.get_submodule(parent), nn.Sequential | nn.ModuleList | nn.ModuleDict):
            parent = parent.rpartition(".")[0]
        for path in (parent,) if parent else layer.consumers[:1]:
            found[path] = None
    return list(found)


def match_blocks_(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    config: CalibrationConfig,
    *,
    generator: torch.Generator,
    progress: Callable[[str, int, int], None],
    blocks: Sequence[str] | None = None,
) -> None:
    """Train the adder layers and the BatchNorms together for ``config.matching_steps`` steps, in place.

    All other layers stay unchanged. BatchNorms use batch statistics during training, so their running statistics have
    to be re-estimated afterwards.

    Args:
        student: The converted model, its layers already fitted one by one.
        teacher: The original network, with the same module paths.
        images: ``[N, C, H, W]``, normalized as the models expect.
        config: Settings of the joint fit: ``matching_steps`` optimizer steps with batches of 64 random images, or fewer
            if the activations of a step would need more than ``memory``.
        generator: Random generator of the batches.
        progress: Called as ``progress(what, done, total)``.
        blocks: Paths of the modules to compare in addition to the outputs; by default, those of ``block_paths``.
    """
    steps = config.matching_steps
    if steps == 0:
        return
    adders = adder_layers(student)
    layers = [layer for layer in trace_layers(student, images[:1]) if layer.path in adders]
    blocks = block_paths(student, layers) if blocks is None else blocks
    # Without classes, as timm's num_classes=0 builds a model, a matrix holds pooled features.
    classifies = getattr(student, "num_classes", None) != 0
    size = _batch_size(layers, len(images), config.memory)
    with eval_mode(student, teacher), _trainable(student, adders) as parameters:
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        )
        for step in range(steps):
            progress("all layers", step, steps)
            chosen = torch.randint(len(images), (size,), generator=generator)
            batch = move_like(images[chosen], student)
            with torch.no_grad():
                wanted = _outputs(teacher, blocks, batch)
            with torch.enable_grad():
                loss = difference(_outputs(student, blocks, batch), wanted, classifies=classifies)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
    progress("all layers", steps, steps)


def _batch_size(layers: Sequence[Layer], images: int, memory: int) -> int:
    """Return how many images, up to 64, fit into ``memory``; at least the number that BatchNorm statistics need."""
    kept = sum(math.prod(layer.input_shape[1:]) + KEPT * math.prod(layer.output_shape[1:]) for layer in layers)
    return min(images, max(LEAST_BATCH, min(BATCH, memory // max(4 * kept, 1))))


def difference(outputs: Outputs, wanted: Outputs, *, classifies: bool = True) -> Tensor:
    """Return the loss: the mean error of the blocks plus the mean error of the model's outputs.

    Args:
        outputs: Outputs of the student.
        wanted: Outputs of the teacher.
        classifies: Whether a matrix that the model returns holds logits, whose class probabilities are compared.
            Otherwise it holds features, which are compared like a block's.

    Raises:
        AdderkitError: If outputs differ in number or shape.
    """
    blocks = [_squared_error(value, wanted.blocks[path], path) for path, value in outputs.blocks.items()]
    ours, theirs = _compared(outputs.returned), _compared(wanted.returned)
    if len(ours) != len(theirs):
        raise AdderkitError(f"the student returns {len(ours)} tensors, expected {len(theirs)}, like the teacher")
    returned = [
        _divergence(value, target) if classifies and value.ndim == 2 else _squared_error(value, target, "the model")
        for value, target in zip(ours, theirs, strict=True)
    ]
    means = [torch.stack(errors).mean() for errors in (blocks, returned) if errors]
    return torch.stack(means).sum() if means else torch.zeros(())


def _compared(returned: Any) -> list[Tensor]:
    """Return the tensors to compare in what a model returned: logits, tokens or feature maps, also nested ones."""
    return [tensor for tensor in returned_tensors(returned) if tensor.ndim >= 2]


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the KL divergence of class probabilities, from logits ``[N, classes]``."""
    student, teacher = (values.float().log_softmax(1) for values in (logits, wanted))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _squared_error(value: Tensor, wanted: Tensor, path: str) -> Tensor:
    """Return the squared error, normalized by the variance of what is wanted; of any shape."""
    target = wanted.float()
    if value.shape != target.shape:
        raise AdderkitError(
            f"the output of {path} has shape {list(value.shape)} in the student and {list(target.shape)} in the "
            "teacher: a pruned network can be matched block by block only with a network of the same channels"
        )
    return (value.float() - target).square().mean() / target.var().clamp_min(1e-6)


def _outputs(model: nn.Module, paths: Sequence[str], batch: Tensor) -> Outputs:
    with outputs_at(model, paths) as found:
        return Outputs(found, model(batch))


@contextmanager
def outputs_at(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the output of the modules at ``paths`` inside the context, by path.

    If a module is called several times, the last output counts; outputs that are not tensors are not recorded.
    """
    found: dict[str, Tensor] = {}

    def record(path: str, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found[path] = output

    with hooked({path: model.get_submodule(path) for path in paths}, post=record):
        yield found


@contextmanager
def _trainable(student: nn.Module, adders: dict[str, AdderConv2d]) -> Iterator[list[dict[str, Any]]]:
    """Make only adder weights and BatchNorms trainable, with a sharp input gradient, inside the context.

    Yields:
        Parameter groups for the optimizer.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in student.parameters()}
    with sharp_gradient(adders.values(), SHARPNESS), updating_statistics(student) as norms:
        rates = [(layer.weight, WEIGHT_RATE * float(layer.weight.detach().std())) for layer in adders.values()]
        groups: list[dict[str, Any]] = [{"params": [weight], "lr": rate} for weight, rate in rates]
        groups.append({"params": [parameter for norm in norms for parameter in norm.parameters()], "lr": NORM_RATE})
        try:
            for parameter in requires_grad:
                parameter.requires_grad_(False)
            for group in groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
            yield [group for group in groups if group["params"]]
        finally:
            for parameter, before in requires_grad.items():
                parameter.requires_grad_(before)
                parameter.grad = None
