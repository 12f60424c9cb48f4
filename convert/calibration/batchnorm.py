"""Re-estimate BatchNorm running statistics, which lag behind fast-moving adder weights.

A running average describes weights that have since changed. Measured on ResNet-20: accuracy with running statistics
fell to 13 % after an epoch whose training loss was fine. So statistics are re-estimated before every evaluation and
before saving.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..graph.modes import eval_mode, move_like

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    return list(named_batch_norms(model).values())


def named_batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BATCH_NORM) and module.running_mean is not None
    }


@torch.no_grad()
def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the gain and shift that a BatchNorm applies in evaluation mode, ``[C]`` each, in fp64 on the CPU."""
    assert isinstance(norm, _BATCH_NORM)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double().cpu() + norm.eps).rsqrt()
    shift = -norm.running_mean.double().cpu() * gain
    if not norm.affine:
        return gain, shift
    factor, bias = norm.weight.double().cpu(), norm.bias.double().cpu()
    return gain * factor, shift * factor + bias


@contextmanager
def updating_statistics(model: nn.Module) -> Iterator[list[nn.modules.batchnorm._BatchNorm]]:
    """Put the BatchNorm layers that keep running statistics into training mode inside the context.

    Modes and momenta are restored on exit, also after an error.

    Yields:
        The layers; their ``momentum`` may be changed.
    """
    norms = batch_norms(model)
    before = [(norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.training = True
        yield norms
    finally:
        for norm, (training, momentum) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum


@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of every BatchNorm by their averages over some batches, in place.

    Only BatchNorm layers run in training mode, so dropout and stochastic depth stay off. Modes and momenta are
    restored, also after an error.

    Args:
        model: The model to change.
        batches: Images ``[N, C, H, W]``, normalized as the model expects. Use an N of at least 32 for a sound estimate;
            batches of a single image are skipped.

    Returns:
        The number of images used. Without any, nothing is changed.
    """
    images = 0
    with eval_mode(model), updating_statistics(model) as norms:
        for batch in batches:
            if len(batch) < 2:  # a BatchNorm on the logits has no variance to measure
                continue
            if images == 0:
                for norm in norms:
                    norm.reset_running_stats()
            images += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / images  # the plain average over all images seen so far
            model(move_like(batch, model))
    return images
