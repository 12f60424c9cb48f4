"""What a layer loses when input channels go: the mean and the variance of the removed term, and the fold of the mean.

Without input channel ``c``, a convolution's output lacks ``Σ w·x_c``, an adder layer's ``-Σ|x_c - w|``. The variance of
that term over images is information; its mean is a constant, which the following normalization or the bias takes up,
however large it is. So a small weight does not mean a small contribution to an adder layer, nor does a large one.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d, adder_conv2d
from ...adder_layers.modules import NormalizedAdderConv2d
from ..calibration.sampling import draw_positions, windows_at
from ..conversion.converters import converter_of
from ..graph.hooks import hooked
from ..graph.layers import Layer
from ..graph.modes import eval_mode, move_like

SAMPLES = 2048
MEMORY = 1 << 30
VALUES = 1 << 20  # terms that are held at a time


@dataclasses.dataclass(frozen=True)
class RemovedTerms:
    """Terms of one layer, by output and input channel, over sampled windows.

    Args:
        mean: ``[O, C / groups]``; sign as in the output.
        variance: ``[O, C / groups]``.
        output_variance: ``[O]`` of the layer's whole output.
    """

    mean: Tensor
    variance: Tensor
    output_variance: Tensor

    @property
    def share(self) -> Tensor:
        """``[O, C / groups]`` variance of each term in units of that of its output channel.

        A normalization behind the layer brings all output channels to the same size, so relative size counts.
        """
        return self.variance / self.output_variance.clamp_min(1e-12)[:, None]


def removed_terms(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor], generator: torch.Generator
) -> Iterator[tuple[str, RemovedTerms]]:
    """The terms of several layers, in as few passes over the images as memory allows.

    Args:
        model: The model, not yet pruned.
        layers: ``Conv2d`` (adder layers included) and ``Linear`` layers, as ``trace_layers`` found them.
        batches: Images ``[n, C, H, W]``.
        generator: Source of the sampled positions.

    Yields:
        A layer's path and its terms.
    """
    images = sum(map(len, batches))
    pending = list(layers)
    while pending:
        chosen: list[Layer] = []
        taken = 0
        while pending and (not chosen or taken + _window_bytes(model, pending[0], images) <= MEMORY):
            taken += _window_bytes(model, pending[0], images)
            chosen.append(pending.pop(0))
        windows = _windows(model, chosen, batches, images, generator)
        for layer in chosen:
            yield layer.path, _terms(model.get_submodule(layer.path), windows.pop(layer.path))


def fold_means_(
    model: nn.Module, layers: Sequence[Layer], terms: Mapping[str, RemovedTerms], removed: Mapping[str, Tensor]
) -> list[str]:
    """Give the means of the removed terms to what follows, in place: the bias, or the mean that a BatchNorm subtracts.

    Args:
        model: The model, not yet narrowed.
        layers: As for ``removed_terms``, with their consumers.
        terms: By path.
        removed: By path, the input channels that the layer is to lose.

    Returns:
        Paths of the layers behind which nothing can take the mean.
    """
    left = []
    for layer in layers:
        if layer.path not in removed:
            continue
        module: Any = model.get_submodule(layer.path)
        constant = _removed_mean(module, terms[layer.path].mean, removed[layer.path])
        consumers = [model.get_submodule(path) for path in layer.consumers]
        norm = consumers[0] if len(consumers) == 1 and not layer.functions else None
        if isinstance(module, NormalizedAdderConv2d):
            norm = module.normalization
        if module.bias is not None:
            module.bias.data += constant.to(module.bias)
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean -= constant.to(norm.running_mean)
        else:
            left.append(layer.path)
    return left


def _removed_mean(module: nn.Module, mean: Tensor, channels: Tensor) -> Tensor:
    """``[O]`` sum of the means of the removed channels' terms."""
    groups = getattr(module, "groups", 1)
    gone = torch.zeros(groups * mean.shape[1])
    gone[channels] = 1
    return torch.einsum("goc,gc->go", mean.unflatten(0, (groups, -1)), gone.view(groups, -1)).flatten()


def _positions(images: int) -> int:
    """Windows of each image."""
    return -(-SAMPLES // images)


def _window_bytes(model: nn.Module, layer: Layer, images: int) -> int:
    module: Any = model.get_submodule(layer.path)
    return int(4 * images * _positions(images) * module.weight[0].numel() * getattr(module, "groups", 1))


def _windows(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor], images: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """``[G, S, C / G · K]`` by path, all from the same pass."""
    by_path = {layer.path: layer for layer in layers}
    modules = {path: model.get_submodule(path) for path in by_path}
    parts: dict[str, list[Tensor]] = {path: [] for path in by_path}
    index = 0

    def sample(path: str, inputs: tuple[Any, ...]) -> None:
        if len(parts[path]) > index:
            return  # a layer that is called again in the same pass: the first call counts
        parts[path].append(_sampled(modules[path], inputs[0], by_path[path], _positions(images), generator).cpu())

    with hooked(modules, pre=sample), eval_mode(model), torch.no_grad():
        for index, batch in enumerate(batches):  # noqa: B007 - the hook reads it
            model(move_like(batch, model))
    return {path: torch.cat(windows, dim=1) for path, windows in parts.items()}


def _sampled(module: nn.Module, input: Tensor, layer: Layer, count: int, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.Conv2d):
        return windows_at(input, module, draw_positions(layer.output_shape, len(input), count, generator)).float()
    tokens = input.reshape(len(input), -1, input.shape[-1])  # [N, T, C]
    chosen = torch.randint(tokens.shape[1], (len(input), count), generator=generator).to(input.device)
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2])).flatten(0, 1)[None].float()


@torch.no_grad()
def _terms(module: nn.Module, windows: Tensor) -> RemovedTerms:
    weight = _effective_weight(module)
    groups, count, _ = windows.shape
    weight = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # [G, O / G, C / G, K]
    windows = windows.reshape(groups, count, *weight.shape[2:])  # [G, S, C / G, K]
    find = _distance_terms if isinstance(module, AdderConv2d) else _product_terms
    found = [find(inputs, filters) for inputs, filters in zip(windows, weight, strict=True)]
    return RemovedTerms(*(torch.cat(values) for values in zip(*found, strict=True)))


def _product_terms(inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a convolution, from the covariances of its inputs alone: ``[S, C, K]`` and ``[O, C, K]``."""
    mean = inputs.mean(0)
    centered = inputs - mean
    covariance = torch.einsum("sck,scl->ckl", centered, centered) / len(inputs)
    variance = torch.einsum("ock,ckl,ocl->oc", filters, covariance, filters).clamp_min(0)
    output = torch.einsum("sk,ok->so", centered.flatten(1), filters.flatten(1))
    return torch.einsum("ock,ck->oc", filters, mean), variance, output.var(0, unbiased=False)


def _distance_terms(inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an adder layer: each channel is a group of a pointwise adder layer whose channels are the window's taps."""
    count, channels, taps = inputs.shape
    means, variances, output = [], [], torch.zeros(len(filters), count)
    for part in torch.arange(channels).split(max(1, VALUES // output.numel())):
        line = inputs[:, part].permute(1, 2, 0).reshape(1, len(part) * taps, 1, count)
        weight = filters[:, part].transpose(0, 1).reshape(-1, taps, 1, 1)
        terms = adder_conv2d(line, weight, groups=len(part)).view(len(part), *output.shape)
        output += terms.sum(0)
        mean = terms.mean(2)
        means.append(mean)
        variances.append(terms.sub_(mean[..., None]).square_().mean(2))
    return torch.cat(means).T, torch.cat(variances).T, output.var(1, unbiased=False)


def _effective_weight(module: nn.Module) -> Tensor:
    """The weight that a layer computes with, on the CPU in fp32."""
    handler = converter_of(type(module))
    weight: Any = module.weight
    if handler is not None and handler.weight is not None:
        assert isinstance(module, nn.Conv2d)
        weight = handler.weight(module)
    return torch.as_tensor(weight).detach().float().cpu()
