"""``adderkit import-checkpoint`` and ``adderkit export``: from files of other programs, and to them."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from ...adder_layers.modules import adder_layers
from ...convert.checkpoint.folder import save
from ...convert.conversion.plan import ConversionPlan
from ...convert.errors import ExportError, ModelSourceError
from ...convert.export.programs import export_onnx, export_program
from ...convert.files import check_file_target, sha256
from ...convert.import_addernet import import_checkpoint
from ...convert.model_source import build_model, check_target, is_folder, lacks_weights
from ...convert.record import require_float
from .portable import FORMS, PortableResult, export_portable, integer_plan, normalization, recorded_images


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """What was imported from where to where."""

    file: str
    model: str
    plan: ConversionPlan
    num_classes: int
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "file": self.file,
            "model": self.model,
            "num_classes": self.num_classes,
            "plan": self.plan.to_dict(),
            "output": str(self.folder),
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        layers = f"{len(self.plan.paths('convert'))} adder layers, {self.num_classes} classes"
        return f"{self.file} is {self.model} with {layers}; it was saved in {self.folder}/"


def run_import(file: str, model: str, num_classes: int | None, output: str | None) -> ImportResult:
    """Read a checkpoint of AdderNet's published code and save it as a folder.

    Args:
        file: The state dict.
        model: timm's name of the network.
        num_classes: By default as many as the file has.
        output: Folder to write; by default ``<model>-adder``.

    Raises:
        AdderkitError: The file is damaged or not of this network, or the folder cannot be written.
    """
    folder = Path(output or f"{model}-adder")
    check_target(model, folder, write=True, checkpoint=file)
    built, plan = import_checkpoint(file, model, num_classes)
    save(built, folder, {"plan": plan.to_dict(), "imported": {"file": Path(file).name, "sha256": sha256(Path(file))}})
    classes: Any = built.num_classes
    return ImportResult(file, model, plan, classes, folder)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was exported to where."""

    model: str
    form: str
    adder_layers: int
    file: Path

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        size = self.file.stat().st_size
        return {
            "model": self.model,
            "format": self.form,
            "adder_layers": self.adder_layers,
            "output": str(self.file),
            "bytes": size,
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        return f"{self.model} with {self.adder_layers} adder layers was written to {self.file}"


_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "c": "-c", "hex": "-hex"}


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What to export.

    Args:
        model: Saved folder, or what else names a model with its weights.
        form: ``onnx``, ``torch-export``, ``c`` or ``hex``.
        output: File to write, or folder for ``c`` and ``hex``; by default the model's name with what says the form,
            in the working folder.
        opset: Of ONNX; by default 18.
        dataset: Data set whose images ``c`` and ``hex`` record.
        data_dir: Where its files are.
    """

    model: str
    form: str = "onnx"
    output: str | None = None
    opset: int | None = None
    dataset: str | None = None
    data_dir: str | None = None

    @property
    def name(self) -> str:
        """What the model is called: the last part of its path."""
        path = Path(self.model.removeprefix("local-dir:"))
        return path.resolve().name if is_folder(self.model) else path.name

    @property
    def target(self) -> Path:
        """The file or folder to write."""
        return Path(self.output or f"{self.name}{_SUFFIXES[self.form]}")


def run_export(job: ExportJob) -> ExportResult | PortableResult:
    """Write a model for another program.

    Args:
        job: What to export.

    Raises:
        AdderkitError: The model cannot be had or exported, packages are missing, or the target cannot be written.
    """
    _check_options(job)
    built = _built(job.model)
    if job.form in FORMS:
        plan = integer_plan(built, job.model, job.form)
        images = recorded_images(plan, built, job.form, job.dataset, job.data_dir)
        return export_portable(plan, job.name, job.form, job.target, images, normalization(built))
    remedy = "take --format c or hex once it is quantized, or export the network it was made from"
    require_float(built, "exported as floats", remedy)
    if job.form == "onnx":
        export_onnx(built, job.target, job.opset or 18)
    else:
        export_program(built, job.target)
    return ExportResult(job.model, job.form, len(adder_layers(built)), job.target)


def _built(name: str) -> nn.Module:
    if not is_folder(name) and lacks_weights(name):
        raise ModelSourceError(
            f"timm has no pretrained weights for {name!r}, expected a network that has some: name the folder that "
            "finetune or convert wrote"
        )
    return build_model(name)


def _check_options(job: ExportJob) -> None:
    if job.form not in _SUFFIXES:
        raise ExportError(f"format is {job.form!r}, expected one of {', '.join(_SUFFIXES)}")
    if job.opset is not None and job.form != "onnx":
        raise ExportError(f"--opset {job.opset} goes with --format onnx, not with {job.form}")
    for option, value in (("--dataset", job.dataset), ("--data-dir", job.data_dir)):
        if value is not None and job.form not in FORMS:
            raise ExportError(f"{option} {value} goes with --format {' or '.join(FORMS)}, not with {job.form}")
    if job.data_dir is not None and job.dataset is None:
        raise ExportError(f"--data-dir {job.data_dir} goes with --dataset, expected its name too")
    if job.form not in FORMS:
        suffix = _SUFFIXES[job.form]
        check_file_target(f"--output {job.target}", job.target, (suffix,), repr(suffix))
