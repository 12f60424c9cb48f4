"""Five measures of channel importance; random choice and weight magnitude are baselines.

- ``variance``: variance over images that the layers that read a channel would lose, as a share of their output's
  variance. Ours, see ``removed_terms.py``; the mean of the removed terms is folded into the next layer.
- ``taylor``: first-order change of the loss when the channel's activation becomes zero (Molchanov et al.,
  arXiv 1906.10771). Labels are sampled from the model's own predictions, so that none are needed (Theis et al.,
  arXiv 1801.05787); adder layers use nearly the true derivative.
- ``batchnorm``: absolute weight of the BatchNorms after the layers that produce the channel (Liu et al.,
  arXiv 1708.06519).
- ``magnitude``: norm of all weights that produce or read the channel (Li et al., arXiv 1608.08710).
- ``random``: random numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adder_layers.modules import adder_layers, sharp_gradient
from ..calibration.blockwise import SHARPNESS
from ..errors import AdderkitError
from ..graph.hooks import hooked
from ..graph.modes import eval_mode, move_like
from .channel_groups import ChannelGroup, Member
from .removed_terms import RemovedTerms
from .surgery import target_at

Scores = list[Tensor]


def variance_scores(model: nn.Module, groups: Sequence[ChannelGroup], terms: Mapping[str, RemovedTerms]) -> Scores:
    """Score channels by the variance that their readers lose, as a share of the variance of their outputs.

    Args:
        model: The model.
        groups: Groups of channels.
        terms: Terms of each reading layer by path.

    Returns:
        Scores ``[channels]`` of each group.
    """
    scores = []
    for group in groups:
        score = torch.zeros(group.channels)
        for member in readers(model, group):
            share = terms[member.path].share
            module = target_at(model, member.path)
            blocks = module.groups if isinstance(module, nn.Conv2d) else 1
            by_input = share.unflatten(0, (blocks, -1)).mean(1).flatten()  # [C], averaged over the filters that read it
            score.index_add_(0, member.roots, by_input[member.positions])
        scores.append(score)
    return scores


def taylor_scores(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Tensor], generator: torch.Generator
) -> Scores:
    """Score channels by the squared first-order change of the loss, averaged over images.

    Args:
        model: A classifier.
        groups: Groups of channels.
        batches: Images ``[n, C, H, W]``.
        generator: Random generator of the labels.

    Returns:
        Scores ``[channels]`` of each group.

    Raises:
        AdderkitError: If the model does not return finite logits.
    """
    paths = {member.path for group in groups for member in readers(model, group)}
    sums: dict[str, Tensor] = {}
    with eval_mode(model), _differentiable(model):
        for batch in batches:
            for path, change in _changes(model, paths, move_like(batch, model), generator).items():
                sums[path] = sums.get(path, torch.zeros(change.shape[1])) + change.square().sum(0)
    scores = []
    for group in groups:
        score = torch.zeros(group.channels)
        for member in readers(model, group):
            if member.path in sums:  # a layer without a gradient does not affect the loss
                score.index_add_(0, member.roots, sums[member.path][member.positions])
        scores.append(score / sum(map(len, batches)))
    return scores


def batchnorm_scores(model: nn.Module, groups: Sequence[ChannelGroup]) -> Scores:
    """Score channels by the mean absolute weight of their BatchNorms.

    Args:
        model: The model.
        groups: Groups of channels.

    Returns:
        Scores ``[channels]`` of each group.

    Raises:
        AdderkitError: If a group has no BatchNorm with weights.
    """
    scores = []
    for group in groups:
        sizes = []
        for member in group.members:
            norm = target_at(model, member.path)
            norm = getattr(norm, "normalization", norm)  # inserted in an adder layer
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is not None:
                size = torch.zeros(group.channels)
                sizes.append(size.index_add_(0, member.roots, _value(norm.weight)[member.positions].abs()))
        if not sizes:
            raise AdderkitError(
                f"the channels of {group.layers[0]} have no BatchNorm with weights; choose another importance, "
                f"or keep them all with --ignore '{group.layers[0]}'"
            )
        scores.append(torch.stack(sizes).mean(0))
    return scores


def magnitude_scores(model: nn.Module, groups: Sequence[ChannelGroup]) -> Scores:
    """Score channels by the norm of the weights that produce and read them, divided by the mean of the group."""
    scores = []
    for group in groups:
        score = torch.zeros(group.channels)
        for member in group.members:
            layer = target_at(model, member.path)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                score.index_add_(0, member.roots, _squares(layer, member)[member.positions])
        root = score.sqrt()
        scores.append(root / root.mean().clamp_min(1e-12))
    return scores


def random_scores(groups: Sequence[ChannelGroup], generator: torch.Generator) -> Scores:
    """Draw scores ``[channels]`` of each group uniformly from 0 to 1."""
    return [torch.rand(group.channels, generator=generator) for group in groups]


def readers(model: nn.Module, group: ChannelGroup) -> list[Member]:
    """Return the layers that sum over a group's channels; a depthwise convolution only passes them on."""
    return [
        member
        for member in group.members
        if member.axis == "inputs" and isinstance(target_at(model, member.path), nn.Conv2d | nn.Linear)
    ]


def _squares(layer: nn.Conv2d | nn.Linear, member: Member) -> Tensor:
    weight = _value(layer.weight).square()
    if member.axis == "outputs":
        return weight.flatten(1).sum(1)
    by_input = weight.sum(tuple(range(2, weight.ndim))) if weight.ndim > 2 else weight  # [O, C / G]
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return torch.flatten(by_input.unflatten(0, (groups, -1)).sum(1))


def _changes(model: nn.Module, paths: set[str], images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return activation times gradient of each layer's input, summed over positions, ``[N, C]`` by path."""
    inputs: dict[str, Tensor] = {}

    def record(path: str, arguments: tuple[Any, ...]) -> None:
        if arguments[0].requires_grad:
            inputs[path] = arguments[0]

    with hooked({path: model.get_submodule(path) for path in paths}, pre=record), torch.enable_grad():
        logits = model(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise AdderkitError("importance 'taylor' needs a classifier; choose another importance")
        if not logits.isfinite().all():
            raise AdderkitError("importance 'taylor' met logits that are not finite; calibrate the model first")
        drawn = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits.float(), drawn.to(logits.device), reduction="sum")
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = {}
    for (path, value), gradient in zip(inputs.items(), gradients, strict=True):
        if gradient is not None:
            linear = isinstance(model.get_submodule(path), nn.Linear)
            change = (value * gradient).detach().float().cpu()
            found[path] = change.reshape(len(change), -1, change.shape[-1]).sum(1) if linear else change.sum((2, 3))
    return found


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Give all activations gradients inside the context, nearly the true ones in adder layers."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with sharp_gradient(adder_layers(model).values(), SHARPNESS):
        try:
            for parameter in requires_grad:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, before in requires_grad.items():
                parameter.requires_grad_(before)


def _value(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
