"""Write a quantized network as a folder of text files: C99 source or memory images."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ....adder_layers.integer.plan import IntegerPlan
from ...errors import CheckpointError, ExportError
from ...files import read_json_object, write_pieces
from ...output import FolderKind
from .c_source import HEADER, c_identifier, c_source
from .inputs import Normalization
from .memory_images import memory_images

PortableForm = Literal["c", "hex"]
MANIFEST = "manifest.json"


def integer_plan(model: nn.Module, name: str, form: PortableForm) -> IntegerPlan:
    """Return the plan of a network that is quantized as a whole.

    Args:
        model: The network.
        name: Name of the model, for the error.
        form: Format that it is to be exported to, for the error.

    Raises:
        ExportError: The model is not quantized, or computes a part in floating point.
    """
    plan = getattr(model, "plan", None)
    if not isinstance(plan, IntegerPlan):
        raise ExportError(
            f"{name} is not quantized, which --format {form} needs; first: adderkit quantize {name} --dataset NAME"
        )
    if any(getattr(model, part, None) is not None for part in ("stem", "head")):
        raise ExportError(
            f"{name} has its first layer and its classifier in fp32, which --format {form} does not support; "
            "quantize again with --first-last int8"
        )
    return plan


def portable_folder(form: PortableForm, name: str) -> FolderKind:
    """Return the kind of folder that ``write_portable`` writes; it may hold other files, such as those of a firmware.

    Args:
        form: ``c`` or ``hex``.
        name: Name of the network.
    """
    if form == "hex":
        return FolderKind("memory images", _has_manifest, lambda folder: any(map(_is_memory_image, folder.iterdir())))
    prefix = c_identifier(name)
    header, names = f"{prefix}.h", (f"{prefix}.h", f"{prefix}_weights.h", f"{prefix}.c", f"{prefix}_test.c")

    def is_ours(folder: Path) -> bool:
        return (folder / header).is_file() and HEADER.encode() in (folder / header).read_bytes()[:200]

    return FolderKind(f"C source of {prefix}", is_ours, lambda folder: any((folder / each).exists() for each in names))


def _has_manifest(folder: Path) -> bool:
    try:
        return {"format", "formula", "steps"} <= read_json_object(folder / MANIFEST).keys()
    except CheckpointError:
        return False


def _is_memory_image(file: Path) -> bool:
    return file.name == MANIFEST or file.suffix == ".hex"


def write_portable(
    plan: IntegerPlan, name: str, form: PortableForm, folder: Path, images: Tensor, pixels: Normalization
) -> list[Path]:
    """Write a quantized network as C99 source or as memory images.

    Args:
        plan: Plan of the network.
        name: Name of the network, used in file names and identifiers.
        form: ``c`` or ``hex``.
        folder: Folder to write to; other files in it are left alone, except memory images of an earlier export.
        images: ``[N, H, W, C]`` uint8, written with the network's outputs for them.
        pixels: Normalization of the images.

    Returns:
        The files that were written.

    Raises:
        ExportError: The format cannot express the network, or the folder cannot be written.
    """
    files = _files(plan, name, form, images, pixels)
    try:
        if form == "hex" and folder.is_dir():
            for stale in filter(_is_memory_image, folder.iterdir()):
                stale.unlink()
        for file, pieces in files.items():
            write_pieces(folder / file, pieces)
    except OSError as error:
        raise ExportError(f"cannot write --output {folder}: {error.strerror or error}") from error
    return [folder / file for file in files]


def _files(
    plan: IntegerPlan, name: str, form: PortableForm, images: Tensor, pixels: Normalization
) -> dict[str, Iterable[str]]:
    if form == "c":
        return c_source(plan, name, images, pixels)
    manifest, files = memory_images(plan, images[0], pixels)
    return files | {MANIFEST: [json.dumps(manifest, indent=2) + "\n"]}  # last: it lists the other files
