"""Fit all adder layers together, without labels, so that the output of each block matches the original's.

A fit of single layers takes the errors of the layers before as given, and the errors add up. Here the whole network is
trained for some steps to reproduce the teacher's activations after each block (after the residual addition, if there is
one) and the feature maps that a backbone returns. BRECQ (arXiv 2102.05426) matches blocks for the same reason.

Class probabilities are not compared: a thousand images have too few of them, and the network learns them by heart. On
CIFAR-10, ResNet-20 with one term agreed with its CNN on 87.6 % of new images after the fit of single layers, on 89.0 %
after a joint fit to blocks, and on 86.9 % after one to blocks and probabilities, which fitted all the images it was
given.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
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
# Adam's learning rate for adder weights, in units of each layer's standard deviation, and for BatchNorms. Each further
# term divides both: it leaves less for the joint fit to remove, and a higher rate does more harm than good.
WEIGHT_RATE, NORM_RATE, TERM_DIVISOR = 0.006, 0.002, 4
# Gives nearly the true derivative of the distance; as a power of two, it does not change the output by a single bit.
SHARPNESS = 1024.0


class Outputs(NamedTuple):
    """Results of a forward pass.

    Args:
        blocks: Outputs of blocks by path.
        maps: Feature maps ``[N, C, H, W]`` and tokens ``[N, L, C]`` that the model returned.
    """

    blocks: dict[str, Tensor]
    maps: list[Tensor]


def block_paths(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Return the paths of the modules whose outputs are compared, in order of execution.

    For each adder layer this is the innermost enclosing module that is not a plain container, such as a residual block.
    A layer without such a module is compared after the module that follows it, such as its normalization.

    Args:
        model: The converted model.
        layers: The adder layers of the model, in order of execution.
    """
    found: dict[str, None] = {}
    for layer in layers:
        parent = layer.path.rpartition(".")[0]
        while parent and isinstance(model.get_submodule(parent), nn.Sequential | nn.ModuleList | nn.ModuleDict):
            parent = parent.rpartition(".")[0]
        found[parent or next(iter(layer.consumers), layer.path)] = None
    return list(found)


def match_blocks_(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    config: CalibrationConfig,
    *,
    generator: torch.Generator,
    progress: Callable[[str, int, int], None],
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

    Raises:
        AdderkitError: If no block returns a tensor, or the outputs of student and teacher differ in shape.
    """
    steps, adders = config.matching_steps, adder_layers(student)
    if steps == 0 or not adders:
        return
    layers = [layer for layer in trace_layers(student, images[:1]) if layer.path in adders]
    blocks = block_paths(student, layers)
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
                loss = difference(_outputs(student, blocks, batch), wanted)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
    progress("all layers", steps, steps)


def _batch_size(layers: Sequence[Layer], images: int, memory: int) -> int:
    """Return how many images, up to 64, fit into ``memory``; at least the number that BatchNorm statistics need."""
    kept = sum(math.prod(layer.input_shape[1:]) + KEPT * math.prod(layer.output_shape[1:]) for layer in layers)
    return min(images, max(LEAST_BATCH, min(BATCH, memory // max(4 * kept, 1))))


def difference(outputs: Outputs, wanted: Outputs) -> Tensor:
    """Return the loss: the mean error of the blocks plus the mean error of the feature maps that the model returned.

    Args:
        outputs: Outputs of the student.
        wanted: Outputs of the teacher.

    Raises:
        AdderkitError: If there is nothing to compare, or outputs differ in number or shape.
    """
    if len(outputs.maps) != len(wanted.maps):
        raise AdderkitError(
            f"the student returns {len(outputs.maps)} feature maps, expected {len(wanted.maps)}, like the teacher"
        )
    blocks = [_squared_error(value, wanted.blocks[path], path) for path, value in outputs.blocks.items()]
    maps = [_squared_error(*pair, "the model") for pair in zip(outputs.maps, wanted.maps, strict=True)]
    means = [torch.stack(errors).mean() for errors in (blocks, maps) if errors]
    if not means:
        raise AdderkitError(
            "no module around a converted layer returns a tensor, so there is nothing to match: set matching_steps to "
            "0, which skips the joint fit"
        )
    return torch.stack(means).sum()


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
        returned = returned_tensors(model(batch))
    return Outputs(found, [tensor for tensor in returned if tensor.ndim >= 3])


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
        shares = [TERM_DIVISOR ** (1.0 - layer.terms) for layer in adders.values()]
        groups: list[dict[str, Any]] = [
            {"params": [layer.weight], "lr": share * WEIGHT_RATE * float(layer.weight.detach().std())}
            for layer, share in zip(adders.values(), shares, strict=True)
        ]
        norm_rate = NORM_RATE * sum(shares) / len(shares)
        groups.append({"params": [parameter for norm in norms for parameter in norm.parameters()], "lr": norm_rate})
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
