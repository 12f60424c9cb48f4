"""Save and load: a folder with ``model.safetensors``, ``config.json``, ``adder_report.json`` and ``README.md``.

The folder is timm's own form (``timm.create_model("local-dir:…", pretrained=True)`` reads it, given adderkit is
imported). No pickle is read or written.
"""

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import create_model, is_model, save_for_hf
from torch import Tensor, nn

from . import registry as registry  # so that create_model knows "adder" and the paper's networks
from .errors import AdderkitError, CheckpointError
from .files import atomic_path, read_json_object, sha256, write_json, write_text
from .model_card import model_card
from .rewrite import is_converted, steps_of

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
REPORT = "adder_report.json"
CARD = "README.md"
FORMAT_VERSION = 1


def save(model: nn.Module, folder: str | Path, report: Mapping[str, Any] | None = None) -> Path:
    """Write a timm model, converted or not, to a folder that ``load`` and timm read back bit-equal.

    Every file is replaced atomically, the configuration last but one and the report last, so that a kill leaves files
    that either fit together or are refused by their checksum. An existing README.md is kept.

    Args:
        model: A model made by ``timm.create_model``, perhaps converted.
        folder: Where to write; made if missing.
        report: JSON-ready facts to keep in ``adder_report.json``: plan, fidelity, metrics, teacher.

    Returns:
        The folder.

    Raises:
        CheckpointError: The model was not made by timm's factory, or the folder cannot be written.
    """
    folder = Path(folder)
    base = base_architecture(model)
    converted = is_converted(model)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "adderkit": json.dumps({"version": FORMAT_VERSION, "steps": steps_of(model)})}
    try:
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata)
            digest = sha256(temporary)
        config = _config(model, base, converted)
        config["adderkit"] = {"version": FORMAT_VERSION, "sha256": digest}
        write_json(folder / CONFIG, config)
        facts = {
            **(report or {}),
            "architecture": config["architecture"],
            "base": base,
            "sha256": digest,
            "versions": {name: version(name) for name in ("adderkit", "torch", "timm", "safetensors")},
        }
        write_json(folder / REPORT, facts)
        if not (folder / CARD).exists():
            write_text(folder / CARD, model_card(base, converted, folder.name))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def load(source: str | Path, pretrained: bool = True) -> nn.Module:
    """Rebuild a saved model, adder network or CNN.

    Args:
        source: A folder, also as ``local-dir:…``, or ``hf-hub:user/name[@revision]``.
        pretrained: Load the weights; without, the structure alone with fresh weights.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: Files are missing, damaged, altered, or not a checkpoint of this kind; nothing is half-loaded.
    """
    name = str(source).removeprefix("local-dir:")
    if name.startswith("hf-hub:"):
        model: nn.Module = create_model(name, pretrained=pretrained)
        return model.eval()
    folder = Path(name)
    _check(folder, pretrained)
    try:
        model = create_model(f"local-dir:{folder}", pretrained=pretrained)
    except AdderkitError:
        raise
    except Exception as error:  # whatever timm makes of a foreign configuration
        raise CheckpointError(f"{folder} does not hold a model that fits its {CONFIG}: {error}") from error
    return model.eval()


def read_report(folder: str | Path) -> dict[str, Any]:
    """The facts in a checkpoint's ``adder_report.json``; empty where it has none."""
    path = Path(folder) / REPORT
    return read_json_object(path) if path.is_file() else {}


def base_architecture(model: nn.Module) -> str:
    """Name in timm's registry of the network a model was built as, before any conversion.

    Raises:
        CheckpointError: The model was not made by timm's factory.
    """
    arguments: Mapping[str, Any] = getattr(model, "_model_args", None) or {}
    name = arguments.get("base") or (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not isinstance(name, str) or not is_model(name):
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved: expected a model made by timm.create_model, which can be built "
            "again by its name; register your own class with timm.models.register_model"
        )
    return name


def _config(model: nn.Module, base: str, converted: bool) -> dict[str, Any]:
    """Timm's own ``config.json`` for the model as it is, under the name ``adder`` if it is one."""
    arguments = dict(getattr(model, "_model_args", {}))
    saved = {key: value for key, value in arguments.items() if key not in ("base", "steps")}
    if converted:
        saved |= {"base": base, "steps": steps_of(model)}
    architecture = "adder" if converted else base
    model._model_args = saved  # type: ignore[assignment]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            save_for_hf(
                model,
                scratch,
                model_config={"pretrained_cfg": {"architecture": architecture}},
                model_args=saved,
                safe_serialization=True,
            )
            return read_json_object(Path(scratch) / CONFIG)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{base} cannot be saved in timm's form: {error}") from error
    finally:
        model._model_args = arguments  # type: ignore[assignment]


def _check(folder: Path, weights: bool) -> None:
    """Refuse a folder that is not whole, before anything is built from it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint written by adderkit or timm")
    config = read_json_object(folder / CONFIG)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not is_model(architecture):
        raise CheckpointError(
            f"architecture is {architecture!r} in {folder / CONFIG}, expected a model that timm knows"
        )
    if not weights:
        return
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected the weights beside {CONFIG}")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; copy or save it again") from error
    ours = config.get("adderkit")
    expected = ours.get("sha256") if isinstance(ours, dict) else None
    if expected is not None and sha256(path) != expected:
        raise CheckpointError(
            f"{path} is not the file that {CONFIG} was written for: its SHA-256 differs from {expected}; "
            "copy both again, or save the model again with adderkit.save"
        )


def state_dict_from(path: str | Path) -> dict[str, Tensor]:
    """Weights from a safetensors file, or from a PyTorch file that holds nothing but tensors.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a file of weights")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as weights: {reason}; expected safetensors, or a PyTorch file with tensors only"
        ) from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict; expected a mapping of names to tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}
