"""Layers of the kernel benchmarks, and the implementations of an adder layer that they compare."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderkit.adder_layers.conv import adder_conv2d
from adderkit.convert.graph.layers import trace_layers

# Images in a batch; those of `cifar_resnet20` have only 32 x 32 pixels.
BATCH = {"cpu": 8, "cuda": 256}
CIFAR_BATCH = {"cpu": 128, "cuda": 256}
# Bytes of temporaries above which a formulation is left out.
MEMORY_LIMIT = 8 << 30


class Layer(NamedTuple):
    """A convolution to measure: shapes and arguments."""

    model: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: int
    groups: int

    @property
    def output(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        batch, _, *size = self.input
        rows, columns = (
            (length + 2 * self.padding - kernel) // self.stride + 1
            for length, kernel in zip(size, self.weight[2:], strict=True)
        )
        return batch, self.weight[0], rows, columns

    @property
    def terms(self) -> int:
        """Number of distances or products that the forward pass computes."""
        return math.prod(self.output) * math.prod(self.weight[1:])


def layers_of(name: str, device: str) -> list[Layer]:
    """Return the model's distinct convolutions without stem and classifier, at the benchmark's batch size."""
    model = timm.create_model(name)
    modules = dict(model.named_modules())
    batch = (CIFAR_BATCH if name.startswith("cifar") else BATCH)[device]
    found: list[Layer] = []
    for layer in trace_layers(model)[1:-1]:
        module = modules[layer.path]
        if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
            continue
        shape = (batch, *layer.input_shape[1:])
        entry = Layer(name, shape, tuple(module.weight.shape), module.stride[0], module.padding[0], module.groups)
        if entry not in found:
            found.append(entry)
    return found


def providers(layer: Layer) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return, by name, differentiable functions of input ``[N, C, H, W]`` and weight ``[O, C / groups, kh, kw]``.

    ``adder`` is ours, ``conv`` torch's convolution, ``cdist`` torch's L1 distance on unfolded input, ``published`` the
    formulation of public AdderNet code. The last two do not support groups and are omitted where they need too much
    memory.
    """
    arguments = (None, layer.stride, layer.padding, 1, layer.groups)
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "adder": lambda x, w: adder_conv2d(x, w, *arguments),
        "conv": lambda x, w: F.conv2d(x, w, *arguments),
    }
    unfolded = 4 * layer.terms // layer.weight[0]
    if layer.groups == 1 and 3 * unfolded < MEMORY_LIMIT:
        found["cdist"] = lambda x, w: _cdist(x, w, layer)
    if layer.groups == 1 and 3 * 4 * layer.terms < MEMORY_LIMIT:
        found["published"] = lambda x, w: _published(x, w, layer)
    return found


def _unfolded(x: Tensor, layer: Layer) -> Tensor:
    """Unfold ``[N, C, H, W]`` to windows, ``[N, K, positions]``."""
    return F.unfold(x, layer.weight[2:], 1, layer.padding, layer.stride)


def _cdist(x: Tensor, w: Tensor, layer: Layer) -> Tensor:
    windows = _unfolded(x, layer).transpose(1, 2)
    return -torch.cdist(windows, w.flatten(1).expand(len(x), -1, -1), p=1.0).transpose(1, 2).reshape(layer.output)


def _published(x: Tensor, w: Tensor, layer: Layer) -> Tensor:
    windows = _unfolded(x, layer).transpose(0, 1).flatten(1)  # [K, N x positions]
    flat = Broadcast.apply(windows, w.flatten(1))  # [O, N x positions]
    result: Tensor = flat.unflatten(1, (len(x), -1)).transpose(0, 1).reshape(layer.output)
    return result


class Broadcast(torch.autograd.Function):
    """Equations 1, 5 and 6 of AdderNet (arXiv 1912.13200), transcribed: all windows against all filters at once."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, filters: Tensor) -> Tensor:
        """Return ``-Σ_k |w[o,k] - x[k,p]|``, ``[O, P]``, of windows ``[K, P]`` and filters ``[O, K]``."""
        ctx.save_for_backward(windows, filters)
        return -(filters[:, :, None] - windows[None]).abs().sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return HardTanh gradients for the windows, full differences for the filters."""
        windows, filters = ctx.saved_tensors
        difference = filters[:, :, None] - windows[None]
        for_windows = for_filters = None
        if ctx.needs_input_grad[1]:
            for_filters = -(difference * grad[:, None]).sum(2)
        if ctx.needs_input_grad[0]:
            for_windows = (difference.clamp_(-1, 1) * grad[:, None]).sum(0)
        return for_windows, for_filters
