"""``adderkit export --format c|hex``: a quantized network for other tools, as a folder of text files."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...adder_layers.integer.plan import Adder, IntegerPlan
from ...adder_layers.integer.reference import quantize
from ...convert.errors import ExportError
from ...convert.export.portable.c_source import Memory, c_source, memory
from ...convert.export.portable.memory_images import memory_images
from ...convert.export.portable.pixels import Normalization
from ...convert.files import write_pieces
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, evaluation_transform, make_loader, subset
from ..training.models import open_split

FORMS = ("c", "hex")
_RECORDED = {"c": 4, "hex": 1}  # images


@dataclasses.dataclass(frozen=True)
class PortableResult:
    """What was exported to where."""

    model: str
    form: str
    adder_layers: int
    folder: Path
    files: tuple[str, ...]
    bytes: int
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "model": self.model,
            "format": self.form,
            "adder_layers": self.adder_layers,
            "output": str(self.folder),
            "files": len(self.files),
            "bytes": self.bytes,
            "ram_bytes": self.memory.ram,
            "rom_bytes": self.memory.rom,
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        what = f"{self.model} with {self.adder_layers} adder layers was written to {self.folder}/"
        if self.form == "hex":
            return f"{what}: {len(self.files)} files, of which manifest.json says what they are"
        code = next(name for name in self.files if name.endswith("_test.c")).removesuffix("_test.c")
        return (
            f"{what}; it needs {self.memory.ram:,} bytes of RAM and {self.memory.rom:,} of ROM besides the code\n"
            f"to test it there: cc -std=c99 {code}.c {code}_test.c && ./a.out"
        )


def integer_plan(model: nn.Module, name: str, form: str) -> IntegerPlan:
    """The plan of a quantized network.

    Raises:
        ExportError: The model called ``name`` is none, or computes a part in floating point.
    """
    plan = getattr(model, "plan", None)
    if not isinstance(plan, IntegerPlan):
        raise ExportError(
            f"{name} is not quantized, which --format {form} needs; first: adderkit quantize {name} --dataset NAME"
        )
    if any(getattr(model, part, None) is not None for part in ("stem", "head")):
        raise ExportError(
            f"{name} has its first layer and its classifier in fp32, which --format {form} cannot have; "
            "quantize again with --first-last int8"
        )
    return plan


def normalization(model: nn.Module) -> Normalization:
    """How a model's images are normalized."""
    config = DataConfig.of(model)
    return Normalization(config.mean, config.std)


def recorded_images(
    plan: IntegerPlan, model: nn.Module, form: str, dataset: str | None, data_dir: str | None
) -> Tensor:
    """Validation images of a data set, the same ones every time, or random bytes.

    Args:
        plan: The network.
        model: It as a model, which says how its images are prepared.
        form: ``c`` or ``hex``.
        dataset: Name of the data set, ``None`` for random bytes.
        data_dir: Where its files are.

    Returns:
        ``[N, H, W, C]`` uint8.

    Raises:
        DatasetError: The data set is missing, or has other classes than the model.
    """
    image, count = plan.activations[0], _RECORDED[form]
    if dataset is None:
        shape = (count, image.height, image.width, image.channels)
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = open_split(Recipe(dataset=dataset, data_dir=data_dir), model, training=False)
    if not isinstance(split, IterableDataset):
        split = subset(split, count, 0)
    loader = make_loader(split, evaluation_transform(DataConfig.of(model)), count, 0, training=False)
    images: Tensor = next(iter(loader))[0]
    return quantize(images, image.scale, image.zero)


def export_portable(
    plan: IntegerPlan, name: str, form: str, folder: Path, images: Tensor, pixels: Normalization
) -> PortableResult:
    """Write a quantized network as C99 or as memory images.

    Args:
        plan: The network.
        name: What it is called.
        form: ``c`` or ``hex``.
        folder: Folder to write into; what else is in it stays.
        images: ``[N, H, W, C]`` uint8, to be recorded.
        pixels: How images are normalized.

    Raises:
        ExportError: The network cannot be expressed, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"--output {folder} is a file, expected a folder")
    files = _files(plan, name, form, images, pixels)
    try:
        for file, pieces in files.items():
            write_pieces(folder / file, pieces)
        size = sum((folder / file).stat().st_size for file in files)
    except OSError as error:
        raise ExportError(f"--output {folder} cannot be written: {error.strerror or error}") from error
    layers = sum(isinstance(step, Adder) for step in plan.steps)
    return PortableResult(name, form, layers, folder, tuple(files), size, memory(plan))


def _files(plan: IntegerPlan, name: str, form: str, images: Tensor, pixels: Normalization) -> dict[str, Iterable[str]]:
    if form == "c":
        return c_source(plan, name, images, pixels)
    manifest, files = memory_images(plan, images[0], pixels)
    return files | {"manifest.json": [json.dumps(manifest, indent=2) + "\n"]}  # last, so that what it names is there
