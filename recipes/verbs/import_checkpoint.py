"""``adderkit import-checkpoint``: read a checkpoint of AdderNet's published code."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal.options import Json, NumClasses, Overwrite, output_option
from ..terminal.output import print_json

if TYPE_CHECKING:
    from ...convert.conversion.plan import ConversionPlan


def import_checkpoint(
    file: Annotated[str, typer.Argument(metavar="FILE", help="State dict of PyTorch or safetensors.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="timm name of its architecture, such as resnet50.")],
    num_classes: NumClasses = None,
    output: Annotated[str | None, output_option("DIR", "MODEL-adder")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Import a checkpoint of AdderNet's published code."""
    result = run_import(file, model, num_classes, output, overwrite=overwrite)
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """Outcome of an import."""

    file: str
    model: str
    plan: "ConversionPlan"
    num_classes: int
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "file": self.file,
            "model": self.model,
            "num_classes": self.num_classes,
            "plan": self.plan.to_dict(),
            "output": str(self.folder),
        }

    def summary(self) -> str:
        """Return a one-line summary."""
        layers = f"{len(self.plan.paths('convert'))} adder layers, {self.num_classes} classes"
        return f"{self.file} is {self.model} with {layers}; saved in {self.folder}/"


def run_import(
    file: str, model: str, num_classes: int | None, output: str | None, *, overwrite: bool = False
) -> ImportResult:
    """Read a checkpoint of AdderNet's published code and save it as a folder.

    Args:
        file: State dict to read.
        model: timm name of the network.
        num_classes: Number of classes; by default that of the file.
        output: Folder to write; by default ``<model>-adder``.
        overwrite: Replace a saved model in the folder.

    Raises:
        AdderkitError: The file is damaged or of another network, or the folder cannot be written.
    """
    from ...convert import import_addernet
    from ...convert.checkpoint.folder import save
    from ...convert.checkpoint.report import MODEL_FOLDER, Report
    from ...convert.files import sha256
    from ...convert.model_source import ModelSource
    from ...convert.output import output_folder
    from ..runs.provenance import command_line

    folder = Path(output or f"{model}-adder")
    ModelSource(model, checkpoint=file).refuse_target(folder)
    with output_folder(folder, MODEL_FOLDER, overwrite=overwrite):
        built, plan = import_addernet.import_checkpoint(file, model, num_classes)
        imported = {"file": Path(file).name, "sha256": sha256(Path(file))}
        save(built, folder, Report().after("import-checkpoint", command_line(), plan=plan.to_dict(), imported=imported))
    classes: Any = built.num_classes
    return ImportResult(file, model, plan, classes, folder)
