"""Synchronized BatchNorm on the CPU, where torch's does not run, so that runs of several processes can be compared.

Loaded by its path, since the scripts of this folder start as programs of their own; ``install`` puts it in the place
of the GPU classes.
"""

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn
from torch.autograd.function import once_differentiable

from adderkit.recipes.distributed import sync_batchnorm


def install():
    """Synchronize BatchNorms by the classes of this file, and allow the CPU."""
    sync_batchnorm._UNSUPPORTED_DEVICES.clear()
    for plain in sync_batchnorm._SYNCED:
        sync_batchnorm._SYNCED[plain] = CPUSyncedBatchNormAct if plain is BatchNormAct2d else CPUSyncedBatchNorm


class CPUSyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalizes the batches of all processes together; not an ``nn.SyncBatchNorm``, which DDP refuses on the CPU."""

    alone = False

    def _check_input_dim(self, input):
        """Any number of dimensions."""

    def forward(self, input):
        if not self.training or self.alone:
            return super().forward(input)
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / self.num_batches_tracked.item()
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        output = Normalization.apply(wide, self.running_mean, self.running_var, self.eps, momentum or 0.0)
        if self.affine:
            output = output * per_channel(self.weight, input) + per_channel(self.bias, input)
        return output.to(input.dtype)


class CPUSyncedBatchNormAct(CPUSyncedBatchNorm):
    """The same for timm's BatchNorm that is followed by an activation."""

    def forward(self, input):
        return self.act(self.drop(super().forward(input)))


class Normalization(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps)`` with the moments of all processes, and its derivative.

    With n the normalized values and g their gradient, the input's is ``(g - mean(g) - n · mean(g · n)) / sqrt(var +
    eps)``, the means again over all processes (Ioffe and Szegedy, arXiv 1502.03167, section 3).
    """

    @staticmethod
    def forward(ctx, input, running_mean, running_var, eps, momentum):
        count = input.new_tensor([input.numel() // input.shape[1]])
        total, count = over_processes(channel_sum(input), count)
        mean = total / count
        centered = input - per_channel(mean, input)
        (squares,) = over_processes(channel_sum(centered.square()))  # from the mean: x² alone would cancel
        scale = (squares / count + eps).rsqrt()
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (count - 1)).to(running_var.dtype), momentum)
        normal = centered * per_channel(scale, input)
        ctx.save_for_backward(normal, scale, count)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        normal, scale, count = ctx.saved_tensors
        total, along = over_processes(channel_sum(grad), channel_sum(grad * normal))
        centered = grad - per_channel(total / count, grad) - normal * per_channel(along / count, grad)
        return centered * per_channel(scale, grad), None, None, None, None


def channel_sum(values):
    """Sum over all axes but the channels."""
    return values.sum([axis for axis in range(values.ndim) if axis != 1])


def per_channel(values, input):
    """One value per channel, shaped so that it applies to ``[N, C, …]``."""
    return values.view(-1, *(1,) * (input.ndim - 2))


def over_processes(*values):
    """Vectors summed over all processes, in one exchange."""
    joined = torch.cat(values)
    dist.all_reduce(joined)
    return joined.split([len(each) for each in values])
