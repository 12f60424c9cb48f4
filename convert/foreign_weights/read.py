"""Read a file of weights that somebody else saved: tensors only, in memory bounded by the size of the file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...adder_layers.conv import AdderConv2d
from ..errors import CheckpointError
from ..files import read_json_object
from .containers import StateDict, find_state_dicts
from .file_kinds import format_of
from .pickles import load_pickled

_INDEX = ".index.json"  # of weights in several files
_FILES = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
_CONFIG = "config.json"  # of a saved folder
_STATE = "state"  # folder with the state of a run, in a saved folder
_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True)
class ForeignWeights:
    """Weights as they are in a file.

    Args:
        path: The file.
        tensors: Tensors by the names in the file.
        container: Where in the file they were, such as ``state_dict_ema``; empty if they are all it holds.
        others: Other state dicts in the file.
        transforms: Record of the model they were saved from, if adderkit saved them.
    """

    path: Path
    tensors: dict[str, Tensor]
    container: str = ""
    others: tuple[str, ...] = ()
    transforms: tuple[Mapping[str, Any], ...] = ()


def read_weights(path: str | Path) -> ForeignWeights:
    """Read weights from a safetensors file, a file of ``torch.save``, or a folder with such a file.

    Containers of training scripts are opened, such as ``{"state_dict": …}``; of several state dicts, the one is taken
    that timm would take, averaged weights first. Of a folder, the file is read that accelerate or transformers write.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something other than tensors.
    """
    path = weights_file(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    kind = format_of(path)
    if kind == "safetensors":
        return ForeignWeights(path, safetensors_state(path), transforms=_transforms(path))
    found = find_state_dicts(load_pickled(path, kind))
    if not found:
        raise CheckpointError(f"{path} does not hold a state dict; expected a mapping of names to tensors")
    first, *others = found
    if others and not first.known:
        raise CheckpointError(
            f"{path} holds several state dicts, {', '.join(state.key for state in found[:5])}, expected one: "
            f"save the one you want with torch.save(torch.load({path.name!r})[{first.key!r}], 'weights.pth')"
        )
    return ForeignWeights(path, _tensors(path, first), first.key, tuple(state.key for state in others))


def safetensors_state(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, whose header gives the position of each.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # from the format, and from shapes and dtypes that torch does not support
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read weights from {path}, which is not a complete safetensors file: {reason}; "
            "copy or save it again"
        ) from error


def _transforms(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the record of a safetensors file that adderkit wrote: in its metadata, or in the folder it is in."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("adderkit")
    try:
        record = json.loads(text) if text is not None else _neighbor(path)
    except (ValueError, RecursionError):
        return ()
    found = record.get("transforms", []) if isinstance(record, dict) else []
    return tuple(each for each in found if isinstance(each, dict)) if isinstance(found, list) else ()


def _neighbor(path: Path) -> Any:
    """Return the arguments in the configuration of the saved folder that a file without metadata lies in.

    The state of a run lies in a folder of its own, ``state``, in a saved folder.
    """
    folder = saved_folder_of(path)
    return {} if folder is None else read_json_object(folder / _CONFIG).get("model_args")


def saved_folder_of(path: Path) -> Path | None:
    """Return the saved folder that a file of weights belongs to, or ``None``."""
    folder = path.parent.parent if path.parent.name == _STATE else path.parent
    return folder if (folder / _CONFIG).is_file() else None


def weights_file(path: str | Path) -> Path:
    """Return the file of weights that a path means: itself, or the one in a folder of accelerate, transformers or timm.

    Raises:
        CheckpointError: The folder has none, or it is not clear which.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(names) == 1:
        return folder / names[0]
    if names:
        raise CheckpointError(
            f"{folder} holds several files of weights, {', '.join(names[:5])}, expected one; name the file"
        )
    if any(folder.rglob("*.distcp")):
        raise CheckpointError(
            f"{folder} is a distributed checkpoint, expected one file; run: accelerate merge-weights {folder} OUTPUT"
        )
    raise CheckpointError(
        f"{folder} holds no weights, expected a folder saved by adderkit or timm, or a file such as {_FILES[0]}"
    )


def _read_shards(index: Path) -> ForeignWeights:
    """Read weights in several files, of which an index says where each tensor is."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map, expected the index of weights in several files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r:.80}, expected a file in the same folder")
        tensors |= read_weights(index.parent / name).tensors
    if missing := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{missing[0]:.80} is in {index} but in none of its files; download or copy them again")
    return ForeignWeights(index, tensors)


def _tensors(path: Path, state: StateDict) -> dict[str, Tensor]:
    """Return the tensors of a state dict; refuse values of other kinds, and shapes that the file cannot fill.

    Weights of adder layers are called ``adder``, as in AdderNet's published code, where the metadata tells them.
    """
    size = path.stat().st_size
    adders = _adder_weights(state)
    tensors = {}
    for key, value in state.values.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} does not hold a state dict: {key:.80} is a {type(value).__name__}, expected a tensor"
            )
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{key:.80} is not a plain tensor in {path}, expected a dense one with its data")
        if value.numel() * value.element_size() > size:
            raise CheckpointError(
                f"{key:.80} has shape {tuple(value.shape)} in {path}, more than its {size} bytes can fill"
            )
        is_adder = key in adders and value.ndim == 4  # BatchNorm's version is the same
        tensors[f"{key.removesuffix('weight')}adder" if is_adder else key] = value.detach()
    return tensors


def _adder_weights(state: StateDict) -> set[str]:
    """Return the names that may be weights of adder layers by the versions of the layers that torch saves."""
    metadata = getattr(state.values, "_metadata", None)
    layers = metadata.items() if isinstance(metadata, Mapping) else ()
    version = AdderConv2d._version
    return {f"{name}.weight" for name, each in layers if isinstance(each, Mapping) and each.get("version") == version}
