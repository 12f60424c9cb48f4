"""BatchNorm statistics measured afresh: they lag badly while adder weights move.

A running average is a memory of layers that no longer exist. Measured on ResNet-20: accuracy with running statistics
fell to 13 % after an epoch whose training loss was fine. So statistics are estimated again before every evaluation
and before saving.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..graph.modes import eval_mode, move_like

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return list(named_batch_norms(model).values())


def named_batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The same by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BATCH_NORM) and module.running_mean is not None
    }


@torch.no_grad()
def affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a BatchNorm with running statistics does in evaluation: gain and shift ``[C]``, fp64 on the CPU."""
    assert isinstance(norm, _BATCH_NORM)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = (norm.running_var.double().cpu() + norm.eps).rsqrt()
    shift = -norm.running_mean.double().cpu() * gain
    if not norm.affine:
        return gain, shift
    factor, bias = norm.weight.double().cpu(), norm.bias.double().cpu()
    return gain * factor, shift * factor + bias


@torch.no_grad()
def reestimate_batchnorm_(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of every BatchNorm by the averages over some batches, in place.

    Only BatchNorm runs in training mode meanwhile, so dropout and stochastic depth stay off. Modes and momenta are
    restored, also after an error.

    Args:
        model: The model to change.
        batches: Images ``[N, C, H, W]``, normalized as the model expects; N of 32 or more keeps the estimate sound,
            and a batch of a single image is left out.

    Returns:
        The number of images used; with no images, nothing is changed.
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    images = 0
    with eval_mode(model):
        try:
            for batch in batches:
                if len(batch) < 2:  # a BatchNorm on the logits has no variance to measure
                    continue
                if images == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.training = True
                images += len(batch)
                for norm in norms:
                    norm.momentum = len(batch) / images  # the plain average over all images seen so far
                model(move_like(batch, model))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return images
