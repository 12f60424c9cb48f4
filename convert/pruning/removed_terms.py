"""Mean and variance of the terms that a layer loses with its input channels, and folding of the mean.

Without input channel ``c``, a convolution's output lacks ``Σ w·x_c``, an adder layer's ``-Σ|x_c - w|``, or
``-Σ_j 2^-j Σ|x_c - w_j|`` with several distances per weight. The variance of that term over images is information; its
mean is a constant, however large, that the next normalization or the bias can absorb. So the magnitude of a weight says
little about its contribution to an adder layer.
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
VALUES = 1 << 20  # terms held at a time


@dataclasses.dataclass(frozen=True)
class RemovedTerms:
    """Statistics of the terms of one layer, by output and input channel, over sampled windows.

    Args:
        mean: Mean of each term, with its sign in the output, ``[O, C / groups]``.
        variance: Variance of each term, ``[O, C / groups]``.
        output_variance: Variance of the layer's output, ``[O]``.
    """

    mean: Tensor
    variance: Tensor
    output_variance: Tensor

    @property
    def share(self) -> Tensor:
        """Variance of each term as a share of the variance of its output channel, ``[O, C / groups]``.

        A normalization after the layer brings all output channels to the same scale, so relative variance counts.
        """
        return self.variance / self.output_variance.clamp_min(1e-12)[:, None]


def removed_terms(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor], generator: torch.Generator
) -> Iterator[tuple[str, RemovedTerms]]:
    """Measure the terms of several layers, in as few passes over the images as memory allows.

    Args:
        model: The model, not yet pruned.
        layers: ``Conv2d`` (including adder) and ``Linear`` layers, as returned by ``trace_layers``.
        batches: Images ``[n, C, H, W]``.
        generator: Random generator of the sampled positions.

    Yields:
        The path and the terms of each layer.
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
    """Fold the means of the removed terms into the bias, or into the running mean of the next BatchNorm, in place.

    Args:
        model: The model, not yet narrowed.
        layers: Layers with their consumers, as for ``removed_terms``.
        terms: Terms of each layer, by path.
        removed: Input channels that each layer will lose, by path.

    Returns:
        Paths of the layers without a bias or BatchNorm that can absorb the mean.
    """
    not_folded = []
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
            not_folded.append(layer.path)
    return not_folded


def _removed_mean(module: nn.Module, mean: Tensor, channels: Tensor) -> Tensor:
    """Return the sum of the means of the removed channels' terms, ``[O]``."""
    groups = getattr(module, "groups", 1)
    gone = torch.zeros(groups * mean.shape[1])
    gone[channels] = 1
    return torch.einsum("goc,gc->go", mean.unflatten(0, (groups, -1)), gone.view(groups, -1)).flatten()


def _positions(images: int) -> int:
    """Return the number of windows per image."""
    return -(-SAMPLES // images)


def _window_bytes(model: nn.Module, layer: Layer, images: int) -> int:
    module: Any = model.get_submodule(layer.path)
    window = module.weight[0].numel() // getattr(module, "terms", 1) * getattr(module, "groups", 1)
    return int(4 * images * _positions(images) * window)


def _windows(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Tensor], images: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Sample input windows ``[G, S, C / G · K]`` of several layers, by path, in one pass over the images."""
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
    distances = module.terms if isinstance(module, AdderConv2d) else 1
    weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], distances, -1)  # [G, O / G, C / G, T, K]
    windows = windows.reshape(groups, count, weight.shape[2], -1)  # [G, S, C / G, K]
    find = _distance_terms if isinstance(module, AdderConv2d) else _product_terms
    found = [find(inputs, filters) for inputs, filters in zip(windows, weight, strict=True)]
    return RemovedTerms(*(torch.cat(values) for values in zip(*found, strict=True)))


def _product_terms(inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of a convolution's terms from the covariances of its inputs.

    Args:
        inputs: Windows of the input, ``[S, C, K]``.
        filters: Weight of the layer, ``[O, C, 1, K]``.

    Returns:
        Mean and variance of the terms, ``[O, C]``, and variance of the output, ``[O]``.
    """
    filters = filters[:, :, 0]
    mean = inputs.mean(0)
    centered = inputs - mean
    covariance = torch.einsum("sck,scl->ckl", centered, centered) / len(inputs)
    variance = torch.einsum("ock,ckl,ocl->oc", filters, covariance, filters).clamp_min(0)
    output = torch.einsum("sk,ok->so", centered.flatten(1), filters.flatten(1))
    return torch.einsum("ock,ck->oc", filters, mean), variance, output.var(0, unbiased=False)


def _distance_terms(inputs: Tensor, filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of an adder layer's terms: each channel is a group of a pointwise layer over its taps.

    Args:
        inputs: Windows of the input, ``[S, C, K]``.
        filters: Weight of the layer, ``[O, C, T, K]`` with T distances per weight.

    Returns:
        Mean and variance of the terms, ``[O, C]``, and variance of the output, ``[O]``.
    """
    count, channels, taps = inputs.shape
    means, variances, output = [], [], torch.zeros(len(filters), count)
    for part in torch.arange(channels).split(max(1, VALUES // output.numel())):
        line = inputs[:, part].permute(1, 2, 0).reshape(1, len(part) * taps, 1, count)
        weight = filters[:, part].permute(1, 0, 3, 2).reshape(-1, taps, filters.shape[2], 1, 1)
        terms = adder_conv2d(line, weight, groups=len(part)).view(len(part), *output.shape)
        output += terms.sum(0)
        mean = terms.mean(2)
        means.append(mean)
        variances.append(terms.sub_(mean[..., None]).square_().mean(2))
    return torch.cat(means).T, torch.cat(variances).T, output.var(1, unbiased=False)


def _effective_weight(module: nn.Module) -> Tensor:
    """Return the weight that a layer computes with, after any transform of its class, in fp32 on the CPU."""
    converter = converter_of(type(module))
    weight: Any = module.weight
    if converter is not None and converter.weight is not None:
        assert isinstance(module, nn.Conv2d)
        weight = converter.weight(module)
    return torch.as_tensor(weight).detach().float().cpu()
