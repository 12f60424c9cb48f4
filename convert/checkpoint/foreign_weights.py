"""Read weights that somebody else saved: tensors only, in memory bounded by the size of the file."""

import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError

_WRAPPERS = ("state_dict_ema", "state_dict", "model")


def state_dict_from(path: str | Path) -> dict[str, Tensor]:
    """Read weights from a safetensors file, or from a PyTorch file that holds nothing but tensors.

    Wrappers of training scripts are removed: ``{"state_dict": …}``, ``{"model": …}``, ``module.`` before each name.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        missing = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {missing}; expected a file with weights")
    if path.suffix == ".safetensors":
        return safetensors_state(path)
    state = _unwrapped(_loaded(path))
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} does not hold a state dict; expected a mapping of names to tensors")
    size = path.stat().st_size
    for key, value in state.items():
        _check_tensor(path, key, value, size)
    return {key.removeprefix("module."): value.detach() for key, value in state.items()}


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
            f"cannot read weights from {path}, which is not a whole safetensors file: {reason}; copy or save it again"
        ) from error


def _loaded(path: Path) -> Any:
    """Read a file by ``torch.load``, restricted to tensors; refuse an archive that unpacks to more than its size."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(f"{path} would unpack to {unpacked} bytes, expected tensors stored as they are")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are harmless or an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except UnpicklingError as error:
        raise CheckpointError(
            f"cannot read weights from {path}: it holds pickled objects, which may run code, expected tensors only. "
            "If it is a whole model that you trust, extract its state dict where the model's code is installed: "
            f"python -c \"import torch; net = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
            "torch.save(net.state_dict(), 'state.pth')\""
        ) from error
    except Exception as error:  # from the unpickler too, which looks opcodes up in a dictionary
        said = type(error).__name__ if isinstance(error, LookupError) else str(error)
        reason = said.splitlines()[0] if said else type(error).__name__
        raise CheckpointError(
            f"cannot read weights from {path}: {reason}; expected safetensors, or a PyTorch file with tensors only"
        ) from error


def _unwrapped(state: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return state


def _check_tensor(path: Path, key: str, value: Any, size: int) -> None:
    """Refuse values that are not plain tensors, and shapes that the bytes of the file cannot fill."""
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
