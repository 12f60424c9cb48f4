"""``adderkit import-checkpoint``: read a checkpoint of AdderNet's published code, or of another adder library."""

import dataclasses
from collections.abc import Sequence
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
    adder_layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Adder layers in a file that calls their parameter 'weight': paths, globs or re:REGEX.",
        ),
    ] = None,
    output: Annotated[str | None, output_option("DIR", "MODEL-adder")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Import weights of AdderNet or another adder library."""
    result = run_import(file, model, num_classes, adder_layers or (), output, overwrite=overwrite)
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
    file: str,
    model: str,
    num_classes: int | None,
    adder_layers: Sequence[str],
    output: str | None,
    *,
    overwrite: bool = False,
) -> ImportResult:
    """Read a checkpoint of an adder network and save it as a folder.

    Args:
        file: State dict to read.
        model: timm name of the network.
        num_classes: Number of classes; by default that of the file.
        adder_layers: Patterns of the adder layers, for a file whose names do not tell.
        output: Folder to write; by default ``<model>-adder``.
        overwrite: Replace a saved model in the folder.

    Raises:
        AdderkitError: The file is damaged or of another network, or the folder cannot be written.
    """
    from ...convert import import_addernet
    from ...convert.checkpoint.folder import save
    from ...convert.checkpoint.report import MODEL_FOLDER, Report
    from ...convert.files import sha256
    from ...convert.foreign_weights.read import weights_file
    from ...convert.model_source import ModelSource
    from ...convert.output import output_folder
    from ..runs.provenance import command_line

    folder = Path(output or f"{model}-adder")
    ModelSource(model, checkpoint=file).refuse_target(folder)
    with output_folder(folder, MODEL_FOLDER, overwrite=overwrite):
        path = weights_file(file)
        built, plan = import_addernet.import_checkpoint(path, model, num_classes, adder_layers)
        imported = {"file": path.name, "sha256": sha256(path)}
        save(built, folder, Report().after("import-checkpoint", command_line(), plan=plan.to_dict(), imported=imported))
    classes: Any = built.num_classes
    return ImportResult(file, model, plan, classes, folder)
