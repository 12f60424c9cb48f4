"""BatchNorm over the batches of all processes as if they were one; torch's own does not run on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as FusedNormalization

from ...convert.errors import RecipeError

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class SyncedBatchNorm(_BATCH_NORM):
    """A BatchNorm whose mean and variance are those of all processes' batches, in training.

    A BatchNorm becomes one by its class alone (``synchronize_batchnorm_``), so parameters, statistics and names in a
    checkpoint are the same. Not a subclass of ``nn.SyncBatchNorm``, which DDP refuses on the CPU.
    """

    alone = False  # this process's batch by itself, as where every process measures the same images

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: the module checked its input when it was a BatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, …]`` to the same shape; called on all processes in training mode."""
        if not self.training or self.alone:
            return super().forward(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / self.num_batches_tracked.item()
        running = self.running_mean, self.running_var
        if input.device.type != "cpu":
            group, processes = dist.group.WORLD, dist.get_world_size()
            fused: Tensor = FusedNormalization.apply(
                input, self.weight, self.bias, *running, self.eps, momentum or 0.0, group, processes
            )
            return fused
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        output: Tensor = _Normalization.apply(wide, *running, self.eps, momentum or 0.0)
        if self.affine:
            output = output * _beside(self.weight, input) + _beside(self.bias, input)
        return output.to(input.dtype)


class SyncedBatchNormAct(SyncedBatchNorm):
    """The same for timm's BatchNorm with an activation behind it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, …]`` to the same shape."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class _Normalization(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps)`` with the moments of all processes, and its derivative.

    With n the normalized values and g their gradient, the input's is ``(g - mean(g) - n · mean(g · n)) / sqrt(var +
    eps)``, the means again over all processes (Ioffe and Szegedy, arXiv 1502.03167, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, eps: float, momentum: float
    ) -> Tensor:
        count = input.new_tensor([input.numel() // input.shape[1]])
        total, count = _over_processes(_sum(input), count)
        mean = total / count
        centered = input - _beside(mean, input)
        (squares,) = _over_processes(_sum(centered.square()))  # from the mean: x² alone would cancel
        scale = (squares / count + eps).rsqrt()
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (count - 1)).to(running_var.dtype), momentum)
        normal = centered * _beside(scale, input)
        ctx.save_for_backward(normal, scale, count)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normal, scale, count = ctx.saved_tensors
        total, along = _over_processes(_sum(grad), _sum(grad * normal))
        centered = grad - _beside(total / count, grad) - normal * _beside(along / count, grad)
        return centered * _beside(scale, grad), None, None, None, None


def _sum(values: Tensor) -> Tensor:
    """Over all but the channels."""
    return values.sum([axis for axis in range(values.ndim) if axis != 1])


def _beside(values: Tensor, input: Tensor) -> Tensor:
    """One value a channel, shaped so that it applies to ``[N, C, …]``."""
    return values.view(-1, *(1,) * (input.ndim - 2))


def _over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    """Vectors summed over all processes, in one exchange."""
    joined = torch.cat(values)
    dist.all_reduce(joined)
    parts: tuple[Tensor, ...] = joined.split([len(each) for each in values])
    return parts


_TWINS = {
    nn.BatchNorm1d: SyncedBatchNorm,
    nn.BatchNorm2d: SyncedBatchNorm,
    nn.BatchNorm3d: SyncedBatchNorm,
    BatchNormAct2d: SyncedBatchNormAct,
}


def synchronize_batchnorm_(model: nn.Module) -> None:
    """Let every BatchNorm of a model see the batches of all processes, in place.

    Raises:
        RecipeError: A BatchNorm is of a class that computes something of its own.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BATCH_NORM):
            if type(module) not in _TWINS:
                raise RecipeError(
                    f"sync_bn is on, but {path} is a {type(module).__name__}, expected a BatchNorm of torch's or "
                    "timm's BatchNormAct2d; set sync_bn to false"
                )
            module.__class__ = _TWINS[type(module)]


@contextmanager
def each_process_alone(model: nn.Module) -> Iterator[None]:
    """Inside, synchronized BatchNorms of a model use their own process's batch."""
    norms = [module for module in model.modules() if isinstance(module, SyncedBatchNorm)]
    for norm in norms:
        norm.alone = True
    try:
        yield
    finally:
        for norm in norms:
            norm.alone = False
