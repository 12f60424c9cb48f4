"""``adderkit import-checkpoint`` and ``adderkit export``: from files of other programs, and to them."""

import dataclasses
from pathlib import Path
from typing import Any

from ..convert.checkpoint import save
from ..convert.errors import ExportError
from ..convert.export import export_onnx, export_program
from ..convert.files import sha256
from ..convert.import_checkpoint import import_checkpoint
from ..convert.plan import ConversionPlan
from ..convert.rewrite import adder_layers
from ..convert.source import build_model, is_folder


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


_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


def run_export(model: str, form: str, output: str | None, opset: int | None) -> ExportResult:
    """Write a model as one file for another program.

    Args:
        model: Saved folder, or what else names a model with its weights.
        form: ``onnx`` or ``torch-export``.
        output: File to write; by default the model's name with ``.onnx`` or ``.pt2``, in the working folder.
        opset: Of ONNX; by default 18.

    Raises:
        AdderkitError: The model cannot be had or exported, packages are missing, or the file cannot be written.
    """
    if form not in _SUFFIXES:
        raise ExportError(f"format is {form!r}, expected {' or '.join(_SUFFIXES)}")
    if opset is not None and form != "onnx":
        raise ExportError(f"--opset {opset} goes with --format onnx, not with {form}")
    name = model.removeprefix("local-dir:")
    target = Path(output or f"{Path(name).resolve().name if is_folder(model) else Path(name).name}{_SUFFIXES[form]}")
    built = build_model(model)
    if form == "onnx":
        export_onnx(built, target, opset or 18)
    else:
        export_program(built, target)
    return ExportResult(model, form, len(adder_layers(built)), target)
