"""All adder layers are fitted together, without labels, so that each block answers like the original's.

Layer by layer, each fit takes what the layers before it left wrong as given, and the errors add up. Here the whole
network is trained for a few hundred steps to give the teacher's activations behind each block (after the residual
addition, where there is one) and its class probabilities. BRECQ (arXiv 2102.05426) matches blocks for the same reason.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adder_layers.modules import adder_layers
from ..errors import AdderkitError
from ..graph.hooks import hooked
from ..graph.layers import Layer, trace_layers
from ..graph.modes import eval_mode, move_like
from .batchnorm import batch_norms
from .config import CalibrationConfig

BATCH, LEAST_BATCH = 64, 8
WARM_UP = 10
# Tensors of a layer's output size that a training step holds: its own, its normalization's, its activation's, and the
# gradient on its way.
KEPT = 4
# Adam's rate for the adder weights in units of their own spread, layer by layer, and that of the BatchNorms.
WEIGHT_RATE, NORM_RATE = 0.01, 0.01
# Nearly the true derivative of the distance; a power of two changes no bit of the output.
SHARPNESS = 1024.0


def block_paths(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Paths of the modules whose outputs are compared, in order of execution.

    That is the nearest module around an adder layer that is more than a sequence, such as a residual block. A layer
    that only the model itself is around is compared behind its normalization.

    Args:
        model: The converted model.
        layers: Its adder layers in order of execution.
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

    What was not converted stays as it is. BatchNorms use the statistics of the batch meanwhile; afterwards they are to
    be estimated again.

    Args:
        student: The converted model, its layers already fitted one by one.
        teacher: The original network, with the same module paths.
        images: ``[N, C, H, W]``, normalized as the models expect.
        config: Settings of the joint fit: ``matching_steps`` optimizer steps with batches of 64 random images, or fewer
            if the activations of a step would need more than ``memory``.
        generator: Source of the batches.
        progress: Called as ``progress(what, done, total)``.
        blocks: Paths of the modules to compare besides the predictions; by default those of ``block_paths``.
    """
    steps = config.matching_steps
    if steps == 0:
        return
    adders = adder_layers(student)
    layers = [layer for layer in trace_layers(student, images[:1]) if layer.path in adders]
    blocks = block_paths(student, layers) if blocks is None else blocks
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
    """Up to 64 images whose activations fit; never fewer than a BatchNorm's statistics need."""
    kept = sum(math.prod(layer.input_shape[1:]) + KEPT * math.prod(layer.output_shape[1:]) for layer in layers)
    return min(images, max(LEAST_BATCH, min(BATCH, memory // max(4 * kept, 1))))


def difference(outputs: tuple[dict[str, Tensor], Any], wanted: tuple[dict[str, Tensor], Any]) -> Tensor:
    """Mean over blocks of the squared error by the teacher's variance, and the divergence of class probabilities."""
    (blocks, logits), (wanted_blocks, wanted_logits) = outputs, wanted
    errors = []
    for path, value in blocks.items():
        target = wanted_blocks[path].float()
        if value.shape != target.shape:
            raise AdderkitError(
                f"{path} gives {list(value.shape)} in the student and {list(target.shape)} in the teacher: a pruned "
                "network can be matched, block by block, only with the network that was pruned like it"
            )
        errors.append((value.float() - target).square().mean() / target.var().clamp_min(1e-6))
    loss = torch.stack(errors).mean() if errors else torch.zeros(())
    if isinstance(logits, Tensor) and logits.ndim == 2:
        student, teacher = (values.float().log_softmax(1) for values in (logits, wanted_logits))
        loss = loss + F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return loss


def _outputs(model: nn.Module, paths: Sequence[str], batch: Tensor) -> tuple[dict[str, Tensor], Any]:
    """What the modules give, and what the model gives."""
    with outputs_at(model, paths) as found:
        return found, model(batch)


@contextmanager
def outputs_at(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what the modules at ``paths`` give that give a tensor; of several calls, the last."""
    found: dict[str, Tensor] = {}

    def record(path: str, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found[path] = output

    with hooked({path: model.get_submodule(path) for path in paths}, post=record):
        yield found


@contextmanager
def _trainable(student: nn.Module, adders: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Only adder weights and BatchNorms learn, with a sharp input gradient; afterwards all is as it was.

    Yields:
        Parameter groups for the optimizer.
    """
    wanted = {parameter: parameter.requires_grad for parameter in student.parameters()}
    sharpness = {path: vars(layer).get("sharpness") for path, layer in adders.items()}
    norms = batch_norms(student)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "lr": WEIGHT_RATE * float(layer.weight.detach().std())} for layer in adders.values()
    ]
    groups.append({"params": [parameter for norm in norms for parameter in norm.parameters()], "lr": NORM_RATE})
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        for layer in adders.values():
            layer.sharpness = SHARPNESS
        for module in (*norms, *adders.values()):
            module.training = True
        yield [group for group in groups if group["params"]]
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for path, layer in adders.items():
            del layer.sharpness  # back to the class's own
            if sharpness[path] is not None:
                layer.sharpness = sharpness[path]
