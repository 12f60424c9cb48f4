"""Structured pruning: remove the least important channels until a model has the configured size or cost."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batchnorm import reestimate_batchnorm_
from ..conversion.targets import require_support
from ..cost.cost import cost
from ..cost.energy import PRECISIONS, arithmetic_energy
from ..cost.report import Cost
from ..errors import AdderkitError, NoModuleMatchedError
from ..graph.layers import Layer, input_size, meta_copy, trace_layers
from ..graph.modes import batches_of
from ..patterns import matching, nearest_names
from ..record import record_, require_float
from ..wrappers import unwrapped
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
from .surgery import narrow_, prune_transform, restored_on_error, shape_of, target_at
from .verify import check_pruning

SEARCH_STEPS = 12


@dataclasses.dataclass(frozen=True)
class PrunedGroup:
    """Result for the channels of one group of layers.

    Args:
        layers: Paths of the layers that produce the channels.
        before: Number of channels before pruning.
        after: Number of channels after pruning.
        reason: Reason why the channels could not be pruned, if so.
    """

    layers: tuple[str, ...]
    before: int
    after: int
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """Result of ``prune_``.

    Args:
        config: Settings of the pruning.
        groups: All groups of channels.
        images: Number of calibration images.
        before: Multiplications, additions, parameters and energy (pJ in fp32) for one image before pruning.
        after: Multiplications, additions, parameters and energy (pJ in fp32) for one image after pruning.
        not_folded: Paths of the layers without a bias or BatchNorm that could absorb the mean of the removed terms.
    """

    config: PruneConfig
    groups: tuple[PrunedGroup, ...]
    images: int
    before: dict[str, float]
    after: dict[str, float]
    not_folded: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}


@dataclasses.dataclass
class _State:
    """State of a pruning between its rounds."""

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

    If that fails, also in a later round, the model stays as it was.

    With images, the mean of the terms that each layer loses is folded into its bias or the next BatchNorm, and all
    BatchNorm statistics are re-estimated.

    Args:
        model: The model to change. Parameters are replaced, so create optimizers afterwards.
        config: Settings of the pruning.
        images: Unlabeled images ``[N, C, H, W]``, normalized as the model expects, or batches of them. A few hundred
            are enough.
        example_input: ``[1, C, H, W]``; needed only without images, for models without a timm configuration.
        batch_size: Images in a forward pass.

    Returns:
        The removed channels, and the cost before and after.

    Raises:
        NoModuleMatchedError: If no channel can be removed, or a pattern to ignore matches no layer.
        AdderkitError: If images are needed but not given, the target cannot be reached, or the model's channels cannot
            be traced.

    Example:
        >>> report = adderkit.prune_(model, adderkit.PruneConfig(target="adds=50%"), images)
        >>> report.after["adds"] <= 0.5 * report.before["adds"]
        True
    """
    model = unwrapped(model, "pruned")
    require_float(model, "pruned", "prune the network that it was made from")
    require_support(model, "pruning", "prune the CNN before converting it")
    batches = batches_of(images, batch_size) if images is not None else []
    count = sum(map(len, batches))
    if config.importance in NEED_IMAGES and count == 0:
        raise AdderkitError(
            f"importance {config.importance!r} is measured on images; pass images (on the command line: --dataset), "
            "or choose another importance"
        )
    if example_input is None:
        example_input = batches[0][:1] if count else torch.zeros(1, *input_size(model))
    generator = torch.Generator().manual_seed(config.seed)
    before = price(cost(model, example_input))
    state = _State(model, config, example_input[:1], batches, generator, before)
    first: list[ChannelGroup] = []
    with restored_on_error(model):
        for index in range(config.iterative):
            groups = _round(state, (index + 1) / config.iterative)
            first = first or groups
            reestimate_batchnorm_(model, batches)  # so that the next round measures a working network
        if not state.narrowed:
            raise NoModuleMatchedError(f"no channel can be removed: {_why_not(first, config)}")
    record_(model, prune_transform(model, list(state.narrowed), config.to_dict()))
    rows = tuple(_row(model, group) for group in first)
    return PruningReport(config, rows, count, before, price(cost(model, example_input)), tuple(state.not_folded))


def _round(state: _State, progress: float) -> list[ChannelGroup]:
    """Measure importance, prune to ``progress`` of the configured amount, and return the groups as they were before."""
    groups = channel_groups(state.model, state.image, state.config.ignore)
    _check_ignored(groups, state.config.ignore)
    for group in groups:
        state.original.setdefault(group.layers[0], group.channels)
    prunable = [group for group in groups if group.reason is None]
    if not prunable:
        return groups
    layers = [layer for layer in trace_layers(state.model, state.image) if _reads(state.model, prunable, layer)]
    terms = dict(removed_terms(state.model, layers, state.batches, state.generator)) if state.batches else {}
    scores = _scores(state, prunable, terms)
    original = [state.original[group.layers[0]] for group in prunable]

    def choose(ratio: float) -> list[Removal]:
        return select(prunable, scores, original, ratio, state.config)

    ratio = state.config.ratio
    removal = choose(ratio * progress) if ratio is not None else _search(state, choose, progress)
    parts = kept_parts(removal)
    if not parts:
        return groups
    check_pruning(state.model, removal, state.image)
    if state.batches:
        removed = _removed_inputs(state.model, removal)
        state.not_folded |= dict.fromkeys(fold_means_(state.model, layers, terms, removed))
    narrow_(state.model, parts)
    state.narrowed |= dict.fromkeys(parts)
    return groups


def _check_ignored(groups: Sequence[ChannelGroup], patterns: Sequence[str]) -> None:
    """Refuse patterns that match no layer: a mistyped one would let layers be pruned that should be kept."""
    paths = [path for group in groups for path in group.layers]
    for pattern in patterns:
        if not any(matching((pattern,), path) for path in paths):
            near = ", ".join(nearest_names(pattern, paths)) or paths[0]
            raise NoModuleMatchedError(f"ignore pattern {pattern!r} matches no layer with channels; nearest: {near}")


def _scores(state: _State, groups: Sequence[ChannelGroup], terms: Any) -> Scores:
    model = state.model
    return {
        "variance": lambda: variance_scores(model, groups, terms),
        "taylor": lambda: taylor_scores(model, groups, state.batches, state.generator),
        "batchnorm": lambda: batchnorm_scores(model, groups),
        "magnitude": lambda: magnitude_scores(model, groups),
        "random": lambda: random_scores(groups, state.generator),
    }[state.config.importance]()


def _search(state: _State, choose: Callable[[float], list[Removal]], progress: float) -> list[Removal]:
    """Search the smallest removal that brings the cost down to ``progress`` of the way to the target."""
    assert state.config.target is not None
    name, share = parse_target(state.config.target)
    goal = state.before[name] * (1 - (1 - share) * progress)

    known: dict[tuple[tuple[str, int], ...], float] = {}

    def cost_of(removal: Sequence[Removal]) -> float:
        sizes = tuple(
            (group.layers[0], len(channels)) for group, channels in removal
        )  # the cost depends only on their number
        if sizes not in known:
            narrowed = meta_copy(state.model)
            narrow_(narrowed, kept_parts(removal))
            known[sizes] = price(cost(narrowed, state.image))[name]
        return known[sizes]

    low, high = 0.0, 1.0
    best = choose(high)
    least = cost_of(best)
    if least > state.before[name] * share:  # detected in the first round, before any change
        left = "one channel" if state.config.round_to == 1 else f"{state.config.round_to} channels"
        raise AdderkitError(
            f"target {state.config.target} cannot be reached: with {left} left in each prunable layer, "
            f"{least / state.before[name]:.1%} of the {name} remain; ignore fewer layers, or choose a larger share"
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
    """Return the input channels that each reading layer will lose, by path."""
    found: dict[str, list[Tensor]] = {}
    for group, channels in removal:
        for member in readers(model, group):
            found.setdefault(member.path, []).append(member.positions[torch.isin(member.roots, channels)])
    return {path: torch.cat(parts) for path, parts in found.items()}


def _row(model: nn.Module, group: ChannelGroup) -> PrunedGroup:
    after = shape_of(target_at(model, group.layers[0]))[0]
    before = group.channels if group.reason is None else after  # the graph may count padded channels
    return PrunedGroup(group.layers, before, after, group.reason)


def _why_not(groups: Sequence[ChannelGroup], config: PruneConfig) -> str:
    reasons = list(dict.fromkeys(group.reason for group in groups if group.reason is not None))
    if len(groups) > sum(group.reason is not None for group in groups):
        if config.round_to > 1:
            return (
                f"{config.ratio or config.target} leaves every layer with its channels, which round_to keeps multiples "
                f"of {config.round_to}; remove more, or choose a smaller round_to"
            )
        return f"{config.ratio or config.target} is less than one channel of any layer; remove more"
    return "; ".join(reasons[:3]) or "the model has no layers with channels"


def price(counted: Cost) -> dict[str, float]:
    """Return the costs that a target may name: operations as they run, parameters, and pJ of fp32 arithmetic."""
    return {
        "mults": counted.multiplications,
        "adds": counted.additions,
        "params": counted.parameters,
        "energy": arithmetic_energy(counted.honest, PRECISIONS["fp32"]),
    }
