"""``adderkit export``: write a model for another program: ONNX, torch.export, C99 or memory images."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...convert.export.opsets import DEFAULT_OPSET
from ..configs.recipe import Recipe
from ..terminal.options import (
    Checkpoint,
    DataDir,
    Dataset,
    InChans,
    Json,
    NumClasses,
    Overwrite,
    Pretrained,
    ValSplit,
    output_option,
)
from ..terminal.output import print_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...adder_layers.integer.plan import IntegerPlan
    from ...convert.export.portable.c_source import Memory
    from ...convert.export.portable.folder import PortableForm
    from ...convert.model_source import ModelSource

Format = Literal["onnx", "torch-export", "c", "hex"]
_SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "c": "-c", "hex": "-hex"}
_RECORDED = {"c": 4, "hex": 1}  # images


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Saved folder or timm model name.")],
    form: Annotated[
        Format, typer.Option("--format", help="Format to write; c and hex need a quantized model.")
    ] = "onnx",
    output: Annotated[str | None, output_option("PATH", "MODEL.onnx|.pt2|-c|-hex", "File or folder to write.")] = None,
    overwrite: Overwrite = False,
    opset: Annotated[
        int | None, typer.Option(metavar="N", help="ONNX opset version.", show_default=f"{DEFAULT_OPSET} for onnx")
    ] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    val_split: ValSplit = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    json: Json = False,
) -> None:
    """Export a model for other programs.

    Formats are ONNX, torch.export programs, C99 source (c) and memory images for $readmemh (hex). The latter two
    come with test images: those of --dataset, or random ones.
    """
    from ...convert.model_source import ModelSource

    source = ModelSource(model, pretrained, checkpoint, num_classes, in_chans)
    split = val_split or Recipe.val_split
    result = run_export(ExportJob(source, form, output, opset, dataset, data_dir, split, overwrite))
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """Model to export, and how.

    Args:
        source: Model to export.
        form: Format to write.
        output: File to write, or folder for ``c`` and ``hex``; by default the model's name with a suffix for the
            format, in the current folder.
        opset: Version of ONNX's operators, for ``onnx`` only; by default ``DEFAULT_OPSET``.
        dataset: Data set whose images ``c`` and ``hex`` record.
        data_dir: Folder with its files.
        val_split: Split that the images are taken from.
        overwrite: Replace an earlier export.
    """

    source: "ModelSource"
    form: Format = "onnx"
    output: str | None = None
    opset: int | None = None
    dataset: str | None = None
    data_dir: str | None = None
    val_split: str = Recipe.val_split
    overwrite: bool = False

    @property
    def name(self) -> str:
        """Name of the model: the last part of its path."""
        return self.source.short_name

    @property
    def target(self) -> Path:
        """The file or folder to write."""
        return Path(self.output or f"{self.name}{_SUFFIXES[self.form]}")


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """File that was written."""

    model: str
    form: Format
    adder_layers: int
    file: Path

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        size = self.file.stat().st_size
        return {
            "model": self.model,
            "format": self.form,
            "adder_layers": self.adder_layers,
            "output": str(self.file),
            "bytes": size,
        }

    def summary(self) -> str:
        """Return a one-line summary."""
        return f"{self.model} with {self.adder_layers} adder layers was written to {self.file}"


@dataclasses.dataclass(frozen=True)
class PortableResult:
    """Folder of C99 source or memory images that was written."""

    model: str
    form: "PortableForm"
    adder_layers: int
    folder: Path
    files: tuple[Path, ...]
    memory: "Memory"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "model": self.model,
            "format": self.form,
            "adder_layers": self.adder_layers,
            "output": str(self.folder),
            "files": len(self.files),
            "bytes": sum(file.stat().st_size for file in self.files),
            "ram_bytes": self.memory.ram,
            "rom_bytes": self.memory.rom,
        }

    def summary(self) -> str:
        """Return a summary; of C99 source, also the memory that it needs and the command that tests it."""
        what = f"{self.model} with {self.adder_layers} adder layers was written to {self.folder}/"
        if self.form == "hex":
            return f"{what}: {len(self.files)} files, described in manifest.json"
        code = next(file.name for file in self.files if file.name.endswith("_test.c")).removesuffix("_test.c")
        return (
            f"{what}; it needs {self.memory.ram:,} bytes of RAM and {self.memory.rom:,} of ROM besides the code\n"
            f"to test it in that folder: cc -std=c99 {code}.c {code}_test.c && ./a.out"
        )


def run_export(job: ExportJob) -> ExportResult | PortableResult:
    """Write a model for another program.

    Args:
        job: Model to export, and how.

    Raises:
        AdderkitError: The model cannot be loaded or exported, packages are missing, or the target cannot be written.
    """
    from ...convert.export.portable.folder import portable_folder
    from ...convert.output import check_output_file, output_folder

    _check_options(job)
    if job.form == "c" or job.form == "hex":
        with output_folder(job.target, portable_folder(job.form, job.name), overwrite=job.overwrite):
            return _export_portable(job.source.build(), job, job.form)
    suffix = _SUFFIXES[job.form]
    check_output_file(f"--output {job.target}", job.target, (suffix,), repr(suffix), overwrite=job.overwrite)
    return _export_program(job.source.build(), job)


def _check_options(job: ExportJob) -> None:
    from ...convert.errors import ExportError

    portable = job.form in _RECORDED
    if job.opset is not None and job.form != "onnx":
        raise ExportError(f"--opset {job.opset} goes with --format onnx, not with {job.form}")
    for option, value in (("--dataset", job.dataset), ("--data-dir", job.data_dir)):
        if value is not None and not portable:
            raise ExportError(f"{option} {value} goes with --format {' or '.join(_RECORDED)}, not with {job.form}")
    if job.data_dir is not None and job.dataset is None:
        raise ExportError(f"--data-dir {job.data_dir} needs the name of the data set: give --dataset as well")


def _export_program(model: "nn.Module", job: ExportJob) -> ExportResult:
    from ...adder_layers.modules import adder_layers
    from ...convert.export.programs import export_onnx, export_program
    from ...convert.record import require_float

    remedy = "take --format c or hex once it is quantized, or export the network it was made from"
    require_float(model, "exported as floats", remedy)
    if job.form == "onnx":
        export_onnx(model, job.target, DEFAULT_OPSET if job.opset is None else job.opset)
    else:
        export_program(model, job.target)
    return ExportResult(job.source.name, job.form, len(adder_layers(model)), job.target)


def _export_portable(model: "nn.Module", job: ExportJob, form: "PortableForm") -> PortableResult:
    from ...adder_layers.integer.plan import Adder
    from ...convert.export.portable.c_source import memory
    from ...convert.export.portable.folder import integer_plan, write_portable
    from ...convert.export.portable.inputs import Normalization
    from ..data.datasets import DataConfig

    plan = integer_plan(model, job.source.name, form)
    data = None
    if job.dataset is not None:
        data = Recipe(dataset=job.dataset, data_dir=job.data_dir, val_split=job.val_split)
    images = recorded_images(plan, model, _RECORDED[form], data)
    config = DataConfig.of(model)
    files = write_portable(plan, job.name, form, job.target, images, Normalization(config.mean, config.std))
    layers = sum(isinstance(step, Adder) for step in plan.steps)
    return PortableResult(job.name, form, layers, job.target, tuple(files), memory(plan))


def recorded_images(plan: "IntegerPlan", model: "nn.Module", count: int, data: Recipe | None) -> "Tensor":
    """Return evaluation images of a data set, the same ones every time, or random bytes.

    Args:
        plan: Plan of the network.
        model: The network, whose configuration says how images are prepared.
        count: Number of images.
        data: Data set and split; ``None`` for random bytes.

    Returns:
        ``[count, H, W, C]`` uint8.

    Raises:
        DatasetError: The data set cannot be opened, or its classes are not the model's.
    """
    import torch
    from torch.utils.data import IterableDataset

    from ...adder_layers.integer.reference import quantize
    from ..data.datasets import DataConfig, subset
    from ..data.loaders import evaluation_transform, make_loader
    from ..training.models import open_split

    image = plan.activations[0]
    if data is None:
        shape = (count, image.height, image.width, image.channels)
        return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    split = open_split(data, model, training=False)
    if not isinstance(split, IterableDataset):
        split = subset(split, count, 0)
    loader = make_loader(split, evaluation_transform(DataConfig.of(model)), count, 0, training=False)
    images: Tensor = next(iter(loader))[0]
    return quantize(images, image.scale, image.zero_point)
