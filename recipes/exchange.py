"""``adderkit import-checkpoint``: a file of AdderNet's published code becomes a folder of ours."""

import dataclasses
from pathlib import Path
from typing import Any

from ..convert.checkpoint import save
from ..convert.files import sha256
from ..convert.import_checkpoint import import_checkpoint
from ..convert.plan import ConversionPlan


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
