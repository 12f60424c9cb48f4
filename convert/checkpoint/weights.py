"""Read the weights of a saved folder, and check that they are intact and belong to the model built for them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..conversion.targets import target_of
from ..errors import CheckpointError
from ..files import read_json_object, sha256
from ..foreign_weights.read import safetensors_state

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_PICKLED = "pytorch_model.bin"  # the weights in a folder that timm wrote without safetensors
_COMPUTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights and compare them with the SHA-256 in the configuration, which folders saved by timm lack.

    Raises:
        CheckpointError: The file is missing, damaged, or not the one that the configuration was written for.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = folder / _PICKLED
        remedy = (
            f"pass {pickled} with --checkpoint and its architecture as the model, or save the model again with "
            "timm's save_for_hf(…, safe_serialization=True)"
            if pickled.is_file()
            else f"expected the weights next to {CONFIG}"
        )
        raise CheckpointError(f"{path} does not exist; {remedy}")
    state = safetensors_state(path)
    ours = read_json_object(folder / CONFIG).get("adderkit")
    expected = ours.get("sha256") if isinstance(ours, dict) else None
    if expected is not None and sha256(path) != expected:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG} was written for: its SHA-256 differs from {expected!s:.64}; "
            "copy both again, or save the model again with adderkit.save"
        )
    return state


def to_file_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the weights of converted layers named by their target, such as ``conv1.adder``.

    So nothing that reads the file by itself, such as ``checkpoint_path`` of timm, can load them into convolutions,
    whose weights have the same names and shapes. AdderNet's published code has the same name.
    """
    names = {ours: theirs for theirs, ours in _file_names(model).items()}
    return {names.get(name, name): tensor for name, tensor in state.items()}


def to_model_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file under the names of a model; files that timm saved have those already."""
    names = _file_names(model)
    return {names.get(name, name): tensor for name, tensor in state.items()}


def _file_names(model: nn.Module) -> dict[str, str]:
    """Return the names of the converted layers' weights in the model by those in a file."""
    return {
        f"{path}.{target.name}": f"{path}.weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if (target := target_of(module)) is not None
    }


def check_shapes(folder: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse weights with other shapes than the model has after its transforms, such as a pruning.

    Raises:
        CheckpointError: A tensor's shape differs.
    """
    own = model.state_dict()
    for name, tensor in state.items():
        if name in own and tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)} in {folder / WEIGHTS}, expected {list(own[name].shape)} by the "
                f"transforms in {CONFIG}: copy both again, or save the model again with adderkit.save"
            )


def check_transforms(folder: Path, transforms: Sequence[Mapping[str, Any]]) -> None:
    """Refuse transforms that differ from the record of the weights: the model would compute another function.

    Raises:
        CheckpointError: The transforms in the weights' metadata are others.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = (file.metadata() or {}).get("adderkit")
    if metadata is not None and json.loads(metadata).get("transforms") != list(transforms):
        raise CheckpointError(
            f"the transforms in {folder / CONFIG} differ from those in {WEIGHTS}; "
            "copy both again, or save the model again with adderkit.save"
        )


def match_dtypes_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model's parameters and buffers the floating-point types that their weights were saved with."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        saved = state.get(name)
        if saved is not None and saved.dtype in _COMPUTABLE and tensor.is_floating_point():
            tensor.data = tensor.data.to(saved.dtype)
