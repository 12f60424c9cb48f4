"""Select the least important channels, of each group of layers or of all groups together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .channel_groups import ChannelGroup
from .config import PruneConfig

Removal = tuple[ChannelGroup, Tensor]
# No group loses a larger share when channels are compared across layers: an empty layer would cut the network.
MOST = 0.9


def select(
    groups: Sequence[ChannelGroup], scores: Sequence[Tensor], original: Sequence[int], ratio: float, config: PruneConfig
) -> list[Removal]:
    """Select the channels to remove.

    Args:
        groups: The groups of channels, all of which can be pruned.
        scores: Scores of each group's channels, ``[channels]``; channels with the lowest scores are removed first.
        original: Number of channels of each group before the first round.
        ratio: Share of the original channels to remove in total, from 0 to 1.
        config: Settings of the pruning.

    Returns:
        Groups that lose channels, each with the channels to remove.
    """
    if config.global_pruning:
        left = _across(scores, original, ratio)
    else:
        left = [math.ceil(round(before * (1 - ratio), 9)) for before in original]
    removal = []
    for group, score, count in zip(groups, scores, left, strict=True):
        step = math.lcm(config.round_to, group.blocks)
        count = min(group.channels, max(step, -(-count // step) * step))
        if count < group.channels and count % group.blocks == 0:
            removal.append((group, _lowest(score, count, group.blocks)))
    return removal


def _across(scores: Sequence[Tensor], original: Sequence[int], ratio: float) -> list[int]:
    """Return how many channels each group keeps if the lowest scores of all groups go, at most ``MOST`` of a group."""
    entries: list[tuple[float, int]] = []
    for index, (score, before) in enumerate(zip(scores, original, strict=True)):
        allowed = max(0, len(score) - max(1, math.ceil(before * (1 - MOST))))
        entries += [(value, index) for value in sorted(score.tolist())[:allowed]]
    wanted = round(ratio * sum(original)) - (sum(original) - sum(map(len, scores)))
    left: list[Any] = [len(score) for score in scores]
    for _, index in sorted(entries)[: max(0, wanted)]:
        left[index] -= 1
    return left


def _lowest(score: Tensor, kept: int, blocks: int) -> Tensor:
    """Return the channels to remove, sorted, so that ``kept`` channels remain, equally many in each block."""
    order = score.view(blocks, -1).argsort(dim=1, stable=True)
    gone = order[:, : order.shape[1] - kept // blocks]
    first = torch.arange(blocks)[:, None] * order.shape[1]
    return (gone + first).flatten().sort().values
