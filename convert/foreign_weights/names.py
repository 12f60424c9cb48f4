"""Match the names of weights to those of a model: prefixes that wrappers add before and between them are stripped."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError

# Modules that torch.compile, FSDP and activation checkpointing put around others, at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OUTER = {
    "module",
    "model",
    "net",
    "network",
    "backbone",
}  # of a whole network in DataParallel, Lightning, …
# What a file may hold besides the model: losses, metrics, the count of torch's AveragedModel, other averages.
_BESIDE = re.compile(
    rf"(({'|'.join(sorted(_OUTER))})\.)*"
    r"(n_averaged|criterion|loss\w*|\w+_loss|\w*metrics?|\w*acc(uracy)?|(\w+_)?ema(_\w+)?)(\..*)?"
)
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?)([._]|$)")
_COUNTERS = (".total_ops", ".total_params")  # of thop
_BATCHES = "num_batches_tracked"  # which files of old PyTorch versions lack


@dataclasses.dataclass(frozen=True)
class Fit:
    """Weights under the names of a model.

    Args:
        tensors: Tensors by the names in the model, and those that do not belong to it, by the names in the file.
        removed: What was stripped from the names, such as ``module._orig_mod.``.
        left_out: Names in the file that were left out: metrics, losses, averages.
    """

    tensors: dict[str, Tensor]
    removed: str = ""
    left_out: tuple[str, ...] = ()


def fit_names(path: str | Path, weights: Mapping[str, Tensor], names: Collection[str]) -> Fit:
    """Give weights the names that a model uses, if all of the model's names are then found.

    Args:
        path: The file, for messages.
        weights: Tensors by the names in the file.
        names: Names of the model's tensors.

    Returns:
        The renamed weights; unchanged if no common prefix makes them fit.

    Raises:
        CheckpointError: Several prefixes fit, so that it is not clear which network is meant.
    """
    originals = {_without_wrappers(name): name for name in weights}
    if len(originals) < len(weights):
        originals = {name: name for name in weights}
    needed = [name for name in names if not name.endswith(_BATCHES)]
    probe = max(needed, key=len, default="")
    prefixes = [name.removesuffix(probe) for name in originals if probe and name.endswith(probe)]
    fitting = [
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith(".")) and all(prefix + name in originals for name in needed)
    ]
    if not fitting:
        return Fit(dict(weights))
    prefix = _chosen(path, fitting)
    tensors, left_out = {}, []
    for name, original in originals.items():
        ours = name.removeprefix(prefix)
        if name.startswith(prefix) and not (ours not in names and f".{ours}".endswith(_COUNTERS)):
            tensors[ours] = weights[original]
        elif name.startswith(prefix) or _BESIDE.fullmatch(name) or _in_another(name, fitting, names):
            left_out.append(original)
        else:
            tensors[original] = weights[original]
    return Fit(tensors, _difference(originals[prefix + probe], probe), tuple(left_out))


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip wrapper prefixes from weights whose own names are not known: those that all of them share."""
    result = {_without_wrappers(name): tensor for name, tensor in weights.items()}
    while result and len(first := {name.partition(".")[0] for name in result}) == 1 and first <= _OUTER:
        result = {name.partition(".")[2]: tensor for name, tensor in result.items()}
    return result


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _chosen(path: str | Path, fitting: Sequence[str]) -> str:
    """Return the prefix of the averaged weights, which timm prefers, or the only one."""
    averaged = [prefix for prefix in fitting if _AVERAGED.search(prefix)]
    chosen = averaged or fitting
    if len(chosen) > 1:
        raise CheckpointError(
            f"{path} holds several networks that fit, {', '.join(map(repr, chosen[:5]))}, expected one: "
            "save the tensors of the one you want, without the others"
        )
    return chosen[0]


def _in_another(name: str, fitting: Sequence[str], names: Collection[str]) -> bool:
    """Whether a tensor belongs to a copy of the network under another prefix, such as the weights before averaging."""
    return any(name.startswith(prefix) and name.removeprefix(prefix) in names for prefix in fitting)


def _difference(original: str, name: str) -> str:
    """Return the parts of a name in the file that the name in the model lacks."""
    left = name.split(".")
    removed = []
    for part in reversed(original.split(".")):
        if left and part == left[-1]:
            left.pop()
        else:
            removed.append(f"{part}.")
    return "".join(reversed(removed))
