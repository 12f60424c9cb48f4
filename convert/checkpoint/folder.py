"""Save and load: a folder with ``model.safetensors``, ``config.json``, ``adder_report.json`` and ``README.md``.

The folder is timm's own form (``timm.create_model("local-dir:…", pretrained=True)`` reads it, given adderkit is
imported). No pickle is read or written.
"""

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from safetensors.torch import save_file
from timm.models import create_model, is_model
from timm.models._hub import save_config_for_hf  # timm's public save_for_hf writes weights as well
from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..conversion.targets import is_converted
from ..errors import AdderkitError, CheckpointError
from ..files import atomic_path, read_json_object, sha256, write_json, write_text
from ..hub import PREFIX, fetch
from ..record import transforms_of
from .allocation import AllocationLimit, count_elements
from .model_card import model_card
from .weights import CONFIG as CONFIG
from .weights import WEIGHTS as WEIGHTS
from .weights import check_shapes, check_transforms, checked_weights

REPORT = "adder_report.json"
CARD = "README.md"
FORMAT_VERSION = 1
_UNKNOWN_SIZE = 1 << 26  # elements that a structure without weights may have, as far as memory goes
_PACKAGES = ("adderkit", "torch", "torchvision", "timm", "accelerate", "safetensors")


def save(
    model: nn.Module,
    folder: str | Path,
    report: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a timm model, converted or not, to a folder that ``load`` and timm read back bit-equal.

    Every file is replaced atomically, the configuration last but one and the report last, so that a kill leaves files
    that either fit together or are refused by their checksum. An existing README.md is kept.

    Args:
        model: A model made by ``timm.create_model``, perhaps converted.
        folder: Where to write; made if missing.
        report: JSON-ready facts to keep in ``adder_report.json``: plan, fidelity, metrics, teacher.
        state: The model's ``state_dict``; to be given where the model has only this process's part of it (FSDP2).

    Returns:
        The folder.

    Raises:
        CheckpointError: The model was not made by timm's factory, or the folder cannot be written.
    """
    folder = Path(folder)
    base = base_architecture(model)
    converted = is_converted(model) or bool(transforms_of(model))  # folded and reverted is not timm's either
    config = _config(model, base, converted)
    # One key only: safetensors writes several in any order, and equal models would not be equal files.
    metadata = {"adderkit": json.dumps({"version": FORMAT_VERSION, "transforms": transforms_of(model)})}
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in (state or model.state_dict()).items()
    }
    facts = {
        **(report or {}),
        "architecture": config["architecture"],
        "base": base,
        "versions": {"python": python_version(), **{name: version(name) for name in _PACKAGES}},
    }
    try:
        json.dumps(facts)
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata)
            digest = sha256(temporary)
        write_json(folder / CONFIG, {**config, "adderkit": {"version": FORMAT_VERSION, "sha256": digest}})
        write_json(folder / REPORT, {**facts, "sha256": digest})
        if not (folder / CARD).exists():
            integers = isinstance(model, IntegerNetwork)
            write_text(folder / CARD, model_card(base, is_converted(model), folder.resolve().name, integers))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    except TypeError as error:
        raise CheckpointError(f"the report cannot be saved as JSON: {error}") from error
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
    folder = fetch(name, (WEIGHTS, CONFIG, REPORT, CARD)) if name.startswith(PREFIX) else Path(name)
    _check_folder(folder)
    state = checked_weights(folder) if pretrained else None
    try:
        # timm would quietly leave out a classifier of another size, and might take another file: we load strictly.
        with AllocationLimit(_UNKNOWN_SIZE if state is None else count_elements(state), str(folder)):
            model: nn.Module = create_model(f"local-dir:{folder}", pretrained=False)
        if state is not None:
            check_transforms(folder, model)
            check_shapes(folder, model, state)
            model.load_state_dict(state)
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
    saved = {key: value for key, value in arguments.items() if key not in ("base", "transforms")}
    if converted:
        saved |= {"base": base, "transforms": transforms_of(model)}
    saved_arguments, architecture = dict(arguments), "adder" if converted else base
    timm_model: Any = model
    timm_model._model_args = saved
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / CONFIG
            save_config_for_hf(model, str(path), {"pretrained_cfg": {"architecture": architecture}}, saved)
            return read_json_object(path)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{base} cannot be saved in timm's form: {error}") from error
    finally:
        timm_model._model_args = saved_arguments


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose configuration is not one of a model, before anything is built from it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint written by adderkit or timm")
    config = read_json_object(folder / CONFIG)
    architecture, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(architecture, str) or not is_model(architecture):
        raise CheckpointError(
            f"architecture is {architecture!r} in {folder / CONFIG}, expected a model that timm knows"
        )
    if not isinstance(arguments, dict):
        raise CheckpointError(f"model_args is {arguments!r:.80} in {folder / CONFIG}, expected an object")
