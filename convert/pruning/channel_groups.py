"""Which channels can only be removed together: found by torch-pruning's dependency graph on a plain twin of the model.

torch-pruning looks classes up exactly and knows no adder layer. A twin whose adder layers are plain convolutions has
the same dependencies and none of these traps. Only the graph is torch-pruning's: choosing and removing is done here,
so that grouped convolutions lose the right channels and everything can be replayed without it.
"""

import copy
import dataclasses
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning import DependencyGraph, ops

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import AdderConv2dSame, NormalizedAdderConv2d
from ..conversion.converters import converter_of, plain_class
from ..errors import AdderkitError
from ..patterns import matching
from .surgery import Kept, is_depthwise, shape_of, target_at

Axis = Literal["outputs", "inputs"]


@dataclasses.dataclass(frozen=True)
class Member:
    """One side of a layer that has the channels of a group.

    Args:
        path: Of the module, or of a bare parameter.
        axis: Which side; ``outputs`` for what has a value for each channel, and for depthwise convolutions.
        positions: ``[P]`` channels on that side.
        roots: ``[P]`` the group's channel that each of them belongs to.
        size: Channels on that side in all.
        dim: Of a bare parameter, its axis.
    """

    path: str
    axis: Axis
    positions: Tensor
    roots: Tensor
    size: int
    dim: int = 0


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels of one or more layers that are removed together: channel by channel, in all members at once.

    Args:
        layers: Paths of the layers that make the channels, in order of registration.
        channels: How many there are.
        members: All layers that have them.
        blocks: Contiguous blocks that must lose equally many, because of grouped convolutions.
        reason: Why the group stays as it is; ``None`` where it can be pruned.
    """

    layers: tuple[str, ...]
    channels: int
    members: tuple[Member, ...]
    blocks: int = 1
    reason: str | None = None


def channel_groups(model: nn.Module, image: Tensor, ignore: Sequence[str] = ()) -> list[ChannelGroup]:
    """All groups of channels of a model, those that must stay as they are included.

    Args:
        model: Any model whose forward pass autograd can follow; it is left untouched.
        image: ``[1, C, H, W]``.
        ignore: Patterns of modules whose output channels stay, as in ``AdderConfig``.

    Returns:
        Groups in order of registration of their first layer.

    Raises:
        AdderkitError: The model cannot be traced.
    """
    twin = plain_twin(model)
    graph = DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bare parameters are found on purpose
            graph.build_dependency(twin, image.float().cpu(), _outputs, verbose=False)
            found = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
            names: dict[Any, str] = {module: path for path, module in twin.named_modules()}
            names |= {parameter: path for path, parameter in twin.named_parameters()}
            order = {path: index for index, path in enumerate(names.values())}
            groups = [_group(twin, graph, group, names, ignore) for group in found]
    except Exception as error:
        raise AdderkitError(f"the channels of {type(model).__name__} cannot be followed: {error}") from error
    return sorted(groups, key=lambda group: order[group.layers[0]])


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, whose adder and standardized layers are plain convolutions."""
    memo: dict[int, Any] = {}
    for module in model.modules():  # hooks are the user's, and may hold what cannot be copied
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo[id(hooks)] = type(hooks)()
    twin = copy.deepcopy(model, memo).cpu().float().eval().requires_grad_(True)
    for module in twin.modules():
        handler = converter_of(type(module))
        if isinstance(module, NormalizedAdderConv2d):
            module.remove_normalization_()
        if isinstance(module, AdderConv2d):
            plain: Any = plain_class(isinstance(module, AdderConv2dSame))
            module.__class__ = plain
        elif isinstance(module, nn.Conv2d) and handler is not None:
            module.__class__ = plain_class(handler.same(module))
    return twin


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """What the model gives, behind an operation of its own, so that the graph knows the last layer from its end."""
    outputs = model(image)
    return [output * 1 for output in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def kept_parts(removed: Sequence[tuple[ChannelGroup, Tensor]]) -> dict[str, Kept]:
    """What stays of each layer when groups lose channels.

    Args:
        removed: Groups, and the channels that each loses.
    """
    gone: dict[str, dict[Axis, list[Tensor]]] = {}
    members = {(member.path, member.axis): member for group, _ in removed for member in group.members}
    for group, channels in removed:
        for member in group.members:
            positions = member.positions[torch.isin(member.roots, channels)]
            gone.setdefault(member.path, {}).setdefault(member.axis, []).append(positions)
    parts = {}
    for path, sides in gone.items():
        kept: dict[str, Any] = {}
        for axis, lost in sides.items():
            member = members[path, axis]
            stays = torch.ones(member.size, dtype=torch.bool)
            stays[torch.cat(lost)] = False
            kept |= {axis: stays.nonzero().flatten(), "axis": member.dim}
        parts[path] = Kept(**kept)
    return parts


def _group(
    twin: nn.Module, graph: DependencyGraph, found: Any, names: Mapping[Any, str], ignore: Sequence[str]
) -> ChannelGroup:
    channels = len(found[0].idxs)
    reason: str | None = None
    members: list[Member] = []
    for item in found:
        target = item.dep.target.module
        if isinstance(target, ops._OutputOp):
            reason = "the model's outputs"
        elif target not in names or not item.idxs:
            continue  # an operation between modules
        elif member := _member(graph, item, names[target]):
            members.append(member)
        else:
            reason = reason or f"{names[target]} is a {type(target).__name__}, which cannot be narrowed"
    made_by = tuple(
        member.path
        for member in members
        if member.axis == "outputs" and isinstance(target_at(twin, member.path), nn.Conv2d | nn.Linear)
    )
    ignored = next((path for path in made_by if matching(ignore, path)), None)
    if ignored is not None:
        reason = f"{ignored} is ignored"
    group = ChannelGroup(tuple(sorted(made_by)) or (names[found[0].dep.target.module],), channels, tuple(members))
    blocks, uneven = _blocks(twin, group)
    if reason is None:
        reason = uneven or _entangled(graph, found, group, names)
    return dataclasses.replace(group, blocks=blocks, reason=reason)


def _member(graph: DependencyGraph, item: Any, path: str) -> Member | None:
    target, dim = item.dep.target.module, 0
    sizes = shape_of(target)
    outputs = graph.is_out_channel_pruning_fn(item.dep.handler)
    if isinstance(target, nn.Conv2d) and target.groups > 1 and target.groups == target.out_channels:
        if not is_depthwise(target):
            return None
        outputs = True
    if isinstance(target, nn.Parameter):
        dim = item.dep.target.pruning_dim
    if not sizes or (isinstance(target, nn.PReLU) and sizes == (1,)):
        return None
    side = dim if isinstance(target, nn.Parameter) else 0 if outputs else 1
    size = sizes[side]
    positions, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
    return Member(path, "outputs" if outputs else "inputs", positions, roots, size, dim)


def _blocks(twin: nn.Module, group: ChannelGroup) -> tuple[int, str | None]:
    """Into how many blocks grouped convolutions part the channels, or why they cannot be pruned."""
    counts = [1]
    for member in group.members:
        layer = target_at(twin, member.path)
        if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or is_depthwise(layer):
            continue
        if member.size == layer.groups:
            return 1, f"{member.path} has one channel in each of its {layer.groups} groups"
        if member.size != group.channels or not torch.equal(member.positions, member.roots):
            return 1, f"{member.path} groups other channels as well"
        counts.append(layer.groups)
    blocks = max(counts)
    if any(blocks % count for count in counts):
        return 1, f"its convolutions have {' and '.join(map(str, sorted(set(counts[1:]))))} groups"
    return blocks, None


def _entangled(graph: DependencyGraph, found: Any, group: ChannelGroup, names: Mapping[Any, str]) -> str | None:
    """Why the channels are not independent of each other, as behind a split whose halves are multiplied.

    The whole group says which positions belong to which channel, but not that one channel takes another along: so half
    of them, drawn at random, are tried.
    """
    if group.channels < 2:
        return "has a single channel"
    chosen = sorted(random.Random(0).sample(range(group.channels), group.channels // 2))
    half = graph.get_pruning_group(found[0].dep.target.module, found[0].dep.handler, chosen)
    taken: dict[tuple[str, Axis], set[int]] = {}
    for item in half:
        if item.dep.target.module in names and (member := _member(graph, item, names[item.dep.target.module])):
            taken.setdefault((member.path, member.axis), set()).update(item.idxs)
    for member in group.members:
        expected = set(member.positions[torch.isin(member.roots, torch.tensor(chosen))].tolist())
        if taken.get((member.path, member.axis), set()) != expected:
            return f"channels of {member.path} depend on each other"
    return None
