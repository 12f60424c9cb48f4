"""Find the channels that must be removed together, with torch-pruning's dependency graph of a plain copy of the model.

torch-pruning looks up classes exactly and does not know adder layers. A copy whose adder layers are plain convolutions
has the same dependencies. Only the graph comes from torch-pruning: channels are chosen and removed here, so that
grouped convolutions lose the right channels and a pruning can be replayed without torch-pruning.
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
from ..graph.hooks import copy_feature_hooks
from ..graph.observe import returned_tensors
from ..patterns import matching
from .surgery import Kept, is_depthwise, shape_of, target_at

Axis = Literal["outputs", "inputs"]


@dataclasses.dataclass(frozen=True)
class Member:
    """Input or output channels of a layer that belong to a group.

    Args:
        path: Path of the module, or of a bare parameter.
        axis: ``inputs`` or ``outputs``; ``outputs`` for per-channel modules and for depthwise convolutions.
        positions: Channels of the layer, ``[P]``.
        roots: Channel of the group that each position belongs to, ``[P]``.
        size: Total number of the layer's channels.
        dim: Axis of the channels in a bare parameter.
    """

    path: str
    axis: Axis
    positions: Tensor
    roots: Tensor
    size: int
    dim: int = 0


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share, so that each channel is removed from all of them at once.

    Args:
        layers: Paths of the layers that produce the channels, in order of registration.
        channels: Number of channels.
        members: All layers that have the channels.
        blocks: Number of contiguous blocks that must lose equally many channels, because of grouped convolutions.
        reason: Reason why the group cannot be pruned; ``None`` if it can.
    """

    layers: tuple[str, ...]
    channels: int
    members: tuple[Member, ...]
    blocks: int = 1
    reason: str | None = None


def channel_groups(model: nn.Module, image: Tensor, ignore: Sequence[str] = ()) -> list[ChannelGroup]:
    """Return all groups of channels of a model, including those that cannot be pruned.

    Args:
        model: Any model with a forward pass that autograd can follow. It is left untouched.
        image: ``[1, C, H, W]``.
        ignore: Patterns of modules that keep all their output channels, as in ``AdderConfig``.

    Returns:
        Groups in the order in which their first layers are registered.

    Raises:
        AdderkitError: If the model cannot be traced.
    """
    plain = plain_copy(model)
    graph = DependencyGraph()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-pruning warns of bare parameters, which are wanted here
            graph.build_dependency(plain, image.float().cpu(), _outputs, verbose=False)
            traced = list(graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)))
            names: dict[Any, str] = {module: path for path, module in plain.named_modules()}
            names |= {parameter: path for path, parameter in plain.named_parameters()}
            order = {path: index for index, path in enumerate(names.values())}
            groups = [_group(plain, graph, group, names, ignore) for group in traced]
    except Exception as error:
        raise AdderkitError(f"cannot trace the channels of {type(model).__name__}: {error}") from error
    return sorted(groups, key=lambda group: order[group.layers[0]])


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in evaluation mode, with plain convolutions for adder and standardized layers."""
    memo: dict[int, Any] = {}
    for module in model.modules():  # the user's hooks may hold objects that cannot be copied
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo[id(hooks)] = type(hooks)()
    plain = copy.deepcopy(model, memo).cpu().float().eval().requires_grad_(True)
    copy_feature_hooks(model, plain)
    for module in plain.modules():
        converter = converter_of(type(module))
        if isinstance(module, NormalizedAdderConv2d):
            module.remove_normalization_()
        if isinstance(module, AdderConv2d):
            if module.terms > 1:
                module.set_terms_(1)
            module_class: Any = plain_class(isinstance(module, AdderConv2dSame))
            module.__class__ = module_class
        elif isinstance(module, nn.Conv2d) and converter is not None:
            module.__class__ = plain_class(converter.same_padding(module))
    return plain


def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Return the model's outputs, each after one more operation, so that the graph ends after the last layer."""
    return [output * 1 for output in returned_tensors(model(image))]


def kept_parts(removed: Sequence[tuple[ChannelGroup, Tensor]]) -> dict[str, Kept]:
    """Return the parts of each layer that remain when groups lose channels.

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
    plain: nn.Module, graph: DependencyGraph, traced: Any, names: Mapping[Any, str], ignore: Sequence[str]
) -> ChannelGroup:
    channels = len(traced[0].idxs)
    reason: str | None = None
    members: list[Member] = []
    for item in traced:
        target = item.dep.target.module
        if isinstance(target, ops._OutputOp):
            reason = "the model's outputs"
        elif target not in names or not item.idxs:
            continue  # an operation between modules
        elif member := _member(graph, item, names[target]):
            members.append(member)
        else:
            reason = reason or f"{names[target]} is a {type(target).__name__}, which cannot be narrowed"
    producers = tuple(
        member.path
        for member in members
        if member.axis == "outputs" and isinstance(target_at(plain, member.path), nn.Conv2d | nn.Linear)
    )
    ignored = next((path for path in producers if matching(ignore, path)), None)
    if ignored is not None:
        reason = f"{ignored} is ignored"
    group = ChannelGroup(tuple(sorted(producers)) or (names[traced[0].dep.target.module],), channels, tuple(members))
    blocks, uneven = _blocks(plain, group)
    if reason is None:
        reason = uneven or _beyond(members) or _entangled(graph, traced, group, names)
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


def _blocks(plain: nn.Module, group: ChannelGroup) -> tuple[int, str | None]:
    """Return the number of blocks that grouped convolutions divide the channels into, or why they cannot be pruned."""
    counts = [1]
    for member in group.members:
        layer = target_at(plain, member.path)
        if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or is_depthwise(layer):
            continue
        if member.size == layer.groups:
            return 1, f"{member.path} has one channel in each of its {layer.groups} groups"
        if member.size != group.channels or not torch.equal(member.positions, member.roots):
            return 1, f"the groups of {member.path} contain other channels too"
        counts.append(layer.groups)
    blocks = max(counts)
    if any(blocks % count for count in counts):
        return 1, f"its convolutions have {' and '.join(map(str, sorted(set(counts[1:]))))} groups"
    return blocks, None


def _beyond(members: Sequence[Member]) -> str | None:
    """Return why channels cannot be followed where the graph gives a layer channels that it does not have."""
    for member in members:
        if int(member.positions.max()) >= member.size:
            return f"channels of {member.path} are padded or cut between layers"
    return None


def _entangled(graph: DependencyGraph, traced: Any, group: ChannelGroup, names: Mapping[Any, str]) -> str | None:
    """Return why channels depend on each other, as after a split whose halves are multiplied, or ``None``.

    The whole group tells which positions belong to which channel, but not whether removing one channel also removes
    another. So the removal of a random half is tried.
    """
    if group.channels < 2:
        return "has a single channel"
    chosen = sorted(random.Random(0).sample(range(group.channels), group.channels // 2))
    half = graph.get_pruning_group(traced[0].dep.target.module, traced[0].dep.handler, chosen)
    taken: dict[tuple[str, Axis], set[int]] = {}
    for item in half:
        if item.dep.target.module in names and (member := _member(graph, item, names[item.dep.target.module])):
            taken.setdefault((member.path, member.axis), set()).update(item.idxs)
    for member in group.members:
        expected = set(member.positions[torch.isin(member.roots, torch.tensor(chosen))].tolist())
        if taken.get((member.path, member.axis), set()) != expected:
            return f"channels of {member.path} depend on each other"
    return None
