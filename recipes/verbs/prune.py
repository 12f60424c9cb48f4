"""``adderkit prune``: remove channels from a model and save what is left."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...convert.pruning.config import NEED_IMAGES, Importance, PruneConfig
from ..data.unlabeled import UnlabeledImages
from ..terminal.options import (
    CalibrationImages,
    Checkpoint,
    DataDir,
    Dataset,
    Device,
    InChans,
    Json,
    NumClasses,
    Overwrite,
    Pretrained,
    TrainSplit,
    output_option,
    unlabeled_images,
)
from ..terminal.output import announce, print_json

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ...convert.checkpoint.report import Report
    from ...convert.model_source import ModelSource
    from ...convert.pruning.prune import PruningReport
    from ..runs.kept_teacher import KeptTeacher

_UNITS = {"mults": "multiplications", "adds": "additions", "params": "parameters", "energy": "energy, fp32, µJ"}


Cost = Annotated[
    str | None,
    typer.Option("--target", metavar="COST=N%", help="Share of mults, adds, params or energy to keep."),
]
Criterion = Annotated[Importance, typer.Option(help="Importance of a channel; variance and taylor need --dataset.")]
Globally = Annotated[bool, typer.Option("--global", help="Rank the channels of all layers together.")]
RoundTo = Annotated[int, typer.Option(min=1, metavar="N", help="Keep a multiple of this many channels.")]
Rounds = Annotated[int, typer.Option(min=1, metavar="N", help="Number of rounds; each measures importance again.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers that keep all channels: path, glob or re:REGEX."),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of images, positions and random importance.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be removed without writing anything.")]


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Saved folder or timm model name.")],
    ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Fraction of the channels to remove, such as 0.3.")
    ] = None,
    target: Cost = None,
    importance: Criterion = PruneConfig.importance,
    global_: Globally = PruneConfig.global_pruning,
    round_to: RoundTo = PruneConfig.round_to,
    iterative: Rounds = PruneConfig.iterative,
    ignore: Ignore = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    train_split: TrainSplit = None,
    calibration_images: CalibrationImages = UnlabeledImages.count,
    seed: Seed = PruneConfig.seed,
    output: Annotated[str | None, output_option("DIR", "MODEL-pruned")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Remove channels from an adder network or a CNN.

    Give either --ratio or --target.
    """
    from ...convert.model_source import ModelSource
    from ..runs.provenance import DataChoice, default_data
    from ..terminal.tables import show

    config = PruneConfig(
        ratio=ratio,
        target=target,
        importance=importance,
        global_pruning=global_,
        round_to=round_to,
        iterative=iterative,
        ignore=tuple(ignore or PruneConfig.ignore),
        seed=seed,
    )
    source = ModelSource(model, pretrained, checkpoint, num_classes, in_chans)
    needed = importance in NEED_IMAGES
    data = default_data(source, DataChoice(dataset, data_dir, train_split), announce, needed=needed)
    job = PruningJob(
        source=source,
        config=config,
        output=output,
        images=unlabeled_images(data.dataset, data.data_dir, data.train_split, calibration_images, seed),
        overwrite=overwrite,
        device=device,
    )
    result = run_pruning(job, dry_run=dry_run, announce=announce)
    if json:
        print_json(result.to_dict())
        return
    show(*pruning_tables(result.report))
    print(result.summary())


@dataclasses.dataclass(frozen=True)
class PruningJob:
    """Model to prune, and how.

    Args:
        source: Model to prune.
        config: How much to prune, and by which importance.
        output: Folder to write; by default ``<model>-pruned`` in the current folder.
        images: Images to measure importance and BatchNorm statistics on.
        overwrite: Replace a saved model in the folder.
        device: Device to compute on; by default the GPU, if there is one.
    """

    source: "ModelSource"
    config: PruneConfig
    output: str | None = None
    images: UnlabeledImages | None = None
    overwrite: bool = False
    device: str | None = None

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.source.default_output("-pruned") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class PruningResult:
    """Outcome of pruning; ``folder`` is ``None`` after a dry run."""

    report: "PruningReport"
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {**self.report.to_dict(), "output": str(self.folder) if self.folder else None}

    def summary(self) -> str:
        """Return a one-line summary."""
        before, after = (sum(getattr(row, when) for row in self.report.groups) for when in ("before", "after"))
        lines = [f"{before - after} of {before} channels removed"]
        if self.report.not_folded:
            layers = ", ".join(self.report.not_folded[:3])
            lines.append(f"the mean of the channels removed from {layers} could not be folded into another layer")
        if self.folder is None:
            lines.append("nothing was written (--dry-run)")
        elif self.report.images == 0:
            lines.append(
                f"saved in {self.folder}/ with the BatchNorm statistics of the unpruned network: its accuracy is "
                "near chance until you fine-tune it, or prune with --dataset"
            )
        else:
            lines.append(f"saved in {self.folder}/, BatchNorm re-estimated on {self.report.images} images")
        return "; ".join(lines)


def run_pruning(job: PruningJob, *, dry_run: bool, announce: Callable[[str], None]) -> PruningResult:
    """Prune a model and save it.

    Args:
        job: Model to prune, and how.
        dry_run: Do everything but write.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be loaded, or the channels cannot be removed as asked.
    """
    from ...convert.checkpoint.report import MODEL_FOLDER
    from ...convert.errors import ModelSourceError
    from ...convert.output import output_folder

    job.source.refuse_target(job.folder)
    if job.config.importance in NEED_IMAGES and job.images is None:
        raise ModelSourceError(
            f"importance {job.config.importance} is measured on unlabeled images: give --dataset, "
            "or --importance batchnorm|magnitude|random"
        )
    if dry_run:
        return PruningResult(_prune(job, announce)[1], None)
    with output_folder(job.folder, MODEL_FOLDER, overwrite=job.overwrite):
        model, report, teacher = _prune(job, announce)
        teacher.save_with(model, job.folder, _report(job, model, report))
    return PruningResult(report, job.folder)


def _prune(job: PruningJob, announce: Callable[[str], None]) -> "tuple[nn.Module, PruningReport, KeptTeacher]":
    from ...convert.checkpoint.configuration import check_savable
    from ...convert.pruning.prune import prune_
    from ..distributed.device import compute_device
    from ..runs.kept_teacher import KeptTeacher

    with compute_device(job.device) as device:
        model = job.source.build().to(device)
        check_savable(model)
        images = None
        if job.images is not None:
            announce(f"pruning {job.source.name} by {job.config.importance} on {job.images}")
            images = job.images.load(model)
        teacher = KeptTeacher.of_successor(job.source, model)
        teacher = dataclasses.replace(teacher, model=copy.deepcopy(teacher.model))  # if it is the unpruned model
        return model, prune_(model, job.config, images), teacher


def _report(job: PruningJob, model: "nn.Module", report: "PruningReport") -> "Report":
    from ..runs.provenance import command_line, facts_of_images, weights_origin

    before = job.source.report()
    return before.after(
        "prune",
        command_line(),
        pruning=report.to_dict(),
        data=facts_of_images(job.images, before),
        source=weights_origin(job.source, model),
    )


def pruning_tables(report: "PruningReport") -> "list[Table]":
    """Tables of the groups of layers that share channels, and of the model's cost before and after."""
    from rich.markup import escape

    from ..terminal.tables import new_table

    groups = new_table("channels", ("layers",), ("before", "after"))
    groups.add_column("kept because of")
    for row in report.groups:
        more = f" and {len(row.layers) - 1} more" if len(row.layers) > 1 else ""
        groups.add_row(escape(row.layers[0]) + more, str(row.before), str(row.after), escape(row.reason or ""))
    total = new_table("cost for one image", ("",), ("before", "after", "remaining"))
    for name, title in _UNITS.items():
        before, after = (values[name] / (1e6 if name == "energy" else 1) for values in (report.before, report.after))
        form = ",.1f" if name == "energy" else ",.0f"
        share = f"{after / before:.1%}".replace("%", " %") if before else ""
        total.add_row(title, f"{before:{form}}", f"{after:{form}}", share)
    return [groups, total]
