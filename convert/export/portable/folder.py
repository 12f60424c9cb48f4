"""Write a quantized network as a folder of text files: C99 source or memory images."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ....adder_layers.integer.plan import IntegerPlan
from ...errors import ExportError
from ...files import write_pieces
from .c_source import c_source
from .inputs import Normalization
from .memory_images import memory_images

PortableForm = Literal["c", "hex"]


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


def write_portable(
    plan: IntegerPlan, name: str, form: PortableForm, folder: Path, images: Tensor, pixels: Normalization
) -> list[Path]:
    """Write a quantized network as C99 source or as memory images.

    Args:
        plan: Plan of the network.
        name: Name of the network, used in file names and identifiers.
        form: ``c`` or ``hex``.
        folder: Folder to write to; other files in it are left alone.
        images: ``[N, H, W, C]`` uint8, written with the network's outputs for them.
        pixels: Normalization of the images.

    Returns:
        The files that were written.

    Raises:
        ExportError: The format cannot express the network, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"--output {folder} is a file, expected a folder")
    files = _files(plan, name, form, images, pixels)
    try:
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
    return files | {"manifest.json": [json.dumps(manifest, indent=2) + "\n"]}  # last: it lists the other files
