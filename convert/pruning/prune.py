"""Structured pruning: whole channels go, by the importance and to the size or cost that a configuration asks for."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import reestimate_batchnorm_
from ..calibration.calibrate import batches_of
from ..cost.cost import cost
from ..cost.energy import PRECISIONS, arithmetic_energy
from ..cost.report import Cost
from ..errors import AdderkitError, NoModuleMatchedError
from ..graph.layers import Layer, input_size, meta_copy, trace_layers
from ..patterns import matching, nearest_names
from ..record import record_, require_float
from .channel_groups import ChannelGroup, channel_groups, kept_parts
from .config import NEED_IMAGES, PruneConfig, parse_target
from .importance import (
    Scores,
    batchnorm_scores,
    magnitude_scores,
    random_scores,
    readers,
    taylor_scores,
    variance_scores,
)
from .removed_terms import fold_means_, removed_terms
from .selection import Removal, select
from .surgery import narrow_, prune_transform, shape_of, target_at
from .verify import check_pruning

SEARCH_STEPS = 12


@dataclasses.dataclass(frozen=True)
class PrunedGroup:
    """What became of the channels of one group of layers.

    Args:
        layers: The layers that make them.
        before: Channels before.
        after: Channels after.
        reason: Why they stayed as they were, where they had to.
    """

    layers: tuple[str, ...]
    before: int
    after: int
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What ``prune_`` did.

    Args:
        config: What was asked for.
        groups: All groups of channels.
        images: Calibration images that were used.
        before: Multiplications, additions, parameters and pJ in fp32 for one image, before.
        after: Likewise, after.
        not_folded: Layers behind which neither bias nor BatchNorm could take the mean of what they lost.
    """

    config: PruneConfig
    groups: tuple[PrunedGroup, ...]
    images: int
    before: dict[str, float]
    after: dict[str, float]
    not_folded: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}


@dataclasses.dataclass
class _Work:
    """One pruning on its way."""

    model: nn.Module
    config: PruneConfig
    image: Tensor
    batches: list[Tensor]
    generator: torch.Generator
    before: dict[str, float]
    original: dict[str, int] = dataclasses.field(default_factory=dict)
    narrowed: dict[str, None] = dataclasses.field(default_factory=dict)
    not_folded: dict[str, None] = dataclasses.field(default_factory=dict)


def prune_(
    model: nn.Module,
    config: PruneConfig,
    images: Tensor | Iterable[Tensor] | None = None,
    *,
    example_input: Tensor | None = None,
    batch_size: int = 64,
) -> PruningReport:
    """Remove channels from an adder network or a CNN, in place.

    With images, the mean of what each layer loses is folded into what follows it, and the statistics of every BatchNorm
    are measured again at the end.

    Args:
        model: The model to change. Parameters are replaced, so make an optimizer afterwards.
        config: What to remove.
        images: ``[N, C, H, W]`` normalized as the model expects, or batches of such, without labels; some hundreds do.
        example_input: ``[1, C, H, W]``, for models that do not say what images they take.
        batch_size: Images in a forward pass.

    Returns:
        What was removed and what it saves.

    Raises:
        NoModuleMatchedError: No channel can be removed, or a pattern to ignore matches no layer.
        AdderkitError: Images are needed and missing, the target cannot be reached, or the model cannot be followed.
    """
    require_float(model, "pruned", "prune the network that it was made from")
    batches = batches_of(images, batch_size) if images is not None else []
    count = sum(map(len, batches))
    if config.importance in NEED_IMAGES and count == 0:
        raise AdderkitError(
            f"importance {config.importance} is measured on images; give some (on the command line: --dataset), "
            "or choose another importance"
        )
    if example_input is None:
        example_input = batches[0][:1] if count else torch.zeros(1, *input_size(model))
    generator = torch.Generator().manual_seed(config.seed)
    before = price(cost(model, example_input))
    work = _Work(model, config, example_input[:1], batches, generator, before)
    first: list[ChannelGroup] = []
    for index in range(config.iterative):
        groups = _round(work, (index + 1) / config.iterative)
        first = first or groups
        reestimate_batchnorm_(model, batches)  # the next round measures a network that works
    if not work.narrowed:
        raise NoModuleMatchedError(f"no channel can be removed: {_why_not(first, config)}")
    record_(model, prune_transform(model, list(work.narrowed), config.to_dict()))
    rows = tuple(_row(model, group) for group in first)
    return PruningReport(config, rows, count, before, price(cost(model, example_input)), tuple(work.not_folded))


def _round(work: _Work, progress: float) -> list[ChannelGroup]:
    """Measure importance and go this share of the way; the groups as they were before."""
    groups = channel_groups(work.model, work.image, work.config.ignore)
    _check_ignored(groups, work.config.ignore)
    for group in groups:
        work.original.setdefault(group.layers[0], group.channels)
    prunable = [group for group in groups if group.reason is None]
    if not prunable:
        return groups
    layers = [layer for layer in trace_layers(work.model, work.image) if _reads(work.model, prunable, layer)]
    terms = dict(removed_terms(work.model, layers, work.batches, work.generator)) if work.batches else {}
    scores = _scores(work, prunable, terms)
    original = [work.original[group.layers[0]] for group in prunable]

    def choose(ratio: float) -> list[Removal]:
        return select(prunable, scores, original, ratio, work.config)

    ratio = work.config.ratio
    removal = choose(ratio * progress) if ratio is not None else _search(work, choose, progress)
    parts = kept_parts(removal)
    if not parts:
        return groups
    check_pruning(work.model, removal, work.image)
    if work.batches:
        removed = _removed_inputs(work.model, removal)
        work.not_folded |= dict.fromkeys(fold_means_(work.model, layers, terms, removed))
    narrow_(work.model, parts)
    work.narrowed |= dict.fromkeys(parts)
    return groups


def _check_ignored(groups: Sequence[ChannelGroup], patterns: Sequence[str]) -> None:
    """A mistyped pattern would let go what was to stay."""
    paths = [path for group in groups for path in group.layers]
    for pattern in patterns:
        if not any(matching((pattern,), path) for path in paths):
            near = ", ".join(nearest_names(pattern, paths)) or paths[0]
            raise NoModuleMatchedError(f"ignore pattern {pattern!r} matches no layer with channels; nearest: {near}")


def _scores(work: _Work, groups: Sequence[ChannelGroup], terms: Any) -> Scores:
    model = work.model
    return {
        "variance": lambda: variance_scores(model, groups, terms),
        "taylor": lambda: taylor_scores(model, groups, work.batches, work.generator),
        "batchnorm": lambda: batchnorm_scores(model, groups),
        "magnitude": lambda: magnitude_scores(model, groups),
        "random": lambda: random_scores(groups, work.generator),
    }[work.config.importance]()


def _search(work: _Work, choose: Callable[[float], list[Removal]], progress: float) -> list[Removal]:
    """The smallest removal that brings the cost down to the target's share of the way."""
    assert work.config.target is not None
    name, share = parse_target(work.config.target)
    goal = work.before[name] * (1 - (1 - share) * progress)

    known: dict[tuple[tuple[str, int], ...], float] = {}

    def cost_of(removal: Sequence[Removal]) -> float:
        sizes = tuple((group.layers[0], len(channels)) for group, channels in removal)  # which ones costs the same
        if sizes not in known:
            narrowed = meta_copy(work.model)
            narrow_(narrowed, kept_parts(removal))
            known[sizes] = price(cost(narrowed, work.image))[name]
        return known[sizes]

    low, high = 0.0, 1.0
    best = choose(high)
    least = cost_of(best)
    if least > work.before[name] * share:  # known in the first round, before anything is changed
        raise AdderkitError(
            f"target {work.config.target} cannot be reached: with one channel left of each prunable layer, "
            f"{least / work.before[name]:.1%} of the {name} remain; ignore fewer layers or aim higher"
        )
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        removal = choose(middle)
        if cost_of(removal) <= goal:
            high, best = middle, removal
        else:
            low = middle
    return best


def _reads(model: nn.Module, groups: Sequence[ChannelGroup], layer: Layer) -> bool:
    return any(member.path == layer.path for group in groups for member in readers(model, group))


def _removed_inputs(model: nn.Module, removal: Sequence[Removal]) -> dict[str, Tensor]:
    """Input channels that each reading layer is to lose."""
    found: dict[str, list[Tensor]] = {}
    for group, channels in removal:
        for member in readers(model, group):
            found.setdefault(member.path, []).append(member.positions[torch.isin(member.roots, channels)])
    return {path: torch.cat(parts) for path, parts in found.items()}


def _row(model: nn.Module, group: ChannelGroup) -> PrunedGroup:
    after = shape_of(target_at(model, group.layers[0]))[0]
    return PrunedGroup(group.layers, group.channels, after, group.reason)


def _why_not(groups: Sequence[ChannelGroup], config: PruneConfig) -> str:
    reasons = list(dict.fromkeys(group.reason for group in groups if group.reason is not None))
    if len(groups) > sum(group.reason is not None for group in groups):
        return f"{config.ratio or config.target} of the channels is less than one of any layer; remove more"
    return "; ".join(reasons[:3]) or "the model has no layers with channels"


def price(counted: Cost) -> dict[str, float]:
    """Return the costs that a target may name: operations as they run, parameters, and pJ of fp32 arithmetic."""
    return {
        "mults": counted.multiplications,
        "adds": counted.additions,
        "params": counted.parameters,
        "energy": arithmetic_energy(counted.honest, PRECISIONS["fp32"]),
    }
