"""Save and load a folder with ``model.safetensors``, ``config.json``, ``adder_report.json`` and ``README.md``.

The folder has timm's format: with adderkit imported, ``timm.create_model("local-dir:…", pretrained=True)`` reads it. No
pickle is read or written.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from safetensors.torch import save_file
from timm.models import create_model, is_model
from torch import Tensor, nn

from ...adder_layers.integer.network import IntegerNetwork
from ..conversion.targets import is_converted
from ..errors import OWN_NETWORK, AdderkitError, CheckpointError
from ..files import atomic_path, read_json_object, sha256, write_json, write_text
from ..hub import PREFIX, fetch
from ..record import transforms_of
from ..wrappers import unwrapped
from .allocation import AllocationLimit, count_elements
from .configuration import base_architecture, check_rebuilds, describe_, model_config
from .image_config import check_image_config
from .model_card import model_card
from .report import REPORT, Report, read_report, write_report
from .weights import CONFIG as CONFIG
from .weights import WEIGHTS as WEIGHTS
from .weights import check_shapes, check_transforms, checked_weights, match_dtypes_, to_file_names, to_model_names

CARD = "README.md"
LOCAL = "local-dir:"
FORMAT_VERSION = 1
_UNKNOWN_SIZE = 1 << 26  # most elements of a model that is built without weights
_PACKAGES = ("adderkit", "torch", "torchvision", "timm", "accelerate", "safetensors")


def save(
    model: nn.Module,
    folder: str | Path,
    report: Report | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a timm model, converted or not, to a folder from which ``load`` and timm restore it bit-exactly.

    Every file is replaced atomically: first the weights, then the configuration, then the report. If the process is
    killed in between, the files either fit together or are refused because of the checksum. A saved model in the folder
    is replaced, as by ``save_pretrained`` of other libraries; other files stay, among them a README.md that was edited.

    Args:
        model: Model built by ``timm.create_model``, converted or not.
        folder: Folder to write; created if it does not exist.
        report: Facts to keep in ``adder_report.json``, such as the plan, the calibration and the teacher.
        state: ``state_dict`` of the model, for a model of which this process holds only a part (FSDP2).

    Returns:
        The folder.

    Raises:
        CheckpointError: The model was not built by timm's factory, or the folder cannot be written.

    Example:
        >>> model = timm.create_model("resnet50", pretrained=True)
        >>> adderkit.convert_(model)
        >>> adderkit.save(model, "resnet50-adder")
        PosixPath('resnet50-adder')
    """
    folder, model = Path(folder), unwrapped(model, sharded=state is not None)
    base, config = base_architecture(model), model_config(model)
    if state is None:  # a run checks its model before it begins
        check_rebuilds(model, config)
    # A single key: safetensors writes several in arbitrary order, so that files of equal models would differ.
    metadata = {"adderkit": json.dumps({"version": FORMAT_VERSION, "transforms": transforms_of(model)})}
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in to_file_names(model, state or model.state_dict()).items()
    }
    card = model_card(base, is_converted(model), folder.resolve().name, isinstance(model, IntegerNetwork))
    report = dataclasses.replace(
        report or Report(),
        card_sha256=hashlib.sha256(card.encode()).hexdigest(),
        architecture=config["architecture"],
        base=base,
        versions={"python": python_version(), **{name: version(name) for name in _PACKAGES}},
    )
    try:
        json.dumps(report.to_dict())
        edited = has_edited_card(folder)
        if not edited:  # a kill must not leave a card that seems to be edited, since it does not fit the new report
            (folder / CARD).unlink(missing_ok=True)
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata)
            digest = sha256(temporary)
        write_json(folder / CONFIG, {**config, "adderkit": {"version": FORMAT_VERSION, "sha256": digest}})
        write_report(folder, dataclasses.replace(report, sha256=digest))
        if not edited:
            write_text(folder / CARD, card)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    except TypeError as error:
        raise CheckpointError(f"cannot save the report as JSON: {error}") from error
    return folder


def load(source: str | Path, pretrained: bool = True) -> nn.Module:
    """Rebuild a saved model: adder network, integer network or CNN.

    Args:
        source: Saved folder, also written ``local-dir:folder``, or ``hf-hub:user/name[@revision]``.
        pretrained: Load the weights; with ``False`` the model gets random ones.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: Files are missing, damaged, altered, or not a checkpoint of this kind; a model is never loaded
            in part.

    Example:
        >>> model = adderkit.load("resnet50-adder")
        >>> logits = model(images)
    """
    name = str(source)
    folder = fetch(name, (WEIGHTS, CONFIG, REPORT, CARD)) if name.startswith(PREFIX) else local_path(name)
    config = _checked_config(folder)
    state = checked_weights(folder) if pretrained else None
    try:
        # timm would silently skip a classifier of another size, and might pick another file, so we load strictly.
        with AllocationLimit(_UNKNOWN_SIZE if state is None else count_elements(state), str(folder)):
            model: nn.Module = create_model(f"local-dir:{folder}", pretrained=False)
            describe_(model, config["architecture"], config.get("pretrained_cfg", {}))
        if state is not None:
            check_transforms(folder, transforms_of(model))
            state = to_model_names(model, state)
            check_shapes(folder, model, state)
            if "adderkit" in config:
                match_dtypes_(model, state)
            model.load_state_dict(state)
    except AdderkitError:
        raise
    except Exception as error:  # any error that timm may raise for a foreign configuration
        raise CheckpointError(f"{folder} does not contain a model that fits its {CONFIG}: {error}") from error
    return model.eval()


def local_path(name: str | Path) -> Path:
    """Return the path that a name means, which may be written ``local-dir:folder`` as for timm."""
    return Path(str(name).removeprefix(LOCAL))


def has_edited_card(folder: Path) -> bool:
    """Return whether a folder has a model card that is not the one that ``save`` wrote."""
    card = folder / CARD
    try:
        return card.is_file() and sha256(card) != read_report(folder).card_sha256
    except CheckpointError:  # the report is damaged
        return True


def _checked_config(folder: Path) -> dict[str, Any]:
    """Read a folder's configuration; refuse one that does not describe a model, before anything is built from it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, expected a checkpoint written by adderkit or timm")
    config = read_json_object(folder / CONFIG)
    architecture, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(architecture, str) or not is_model(architecture):
        raise CheckpointError(
            f"architecture is {architecture!r} in {folder / CONFIG}, expected a model that timm knows; {OWN_NETWORK}"
        )
    if not isinstance(arguments, dict):
        raise CheckpointError(f"model_args is {arguments!r:.80} in {folder / CONFIG}, expected an object")
    check_image_config(config, folder / CONFIG)
    return config
