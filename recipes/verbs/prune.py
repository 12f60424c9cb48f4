"""The ``prune`` verb's work: build a model, remove channels from it, save it with a record of what is left."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ...convert.checkpoint.folder import read_report, save
from ...convert.errors import ModelSourceError
from ...convert.model_source import build_model, check_target, default_folder, is_folder
from ...convert.pruning.config import NEED_IMAGES, PruneConfig
from ...convert.pruning.prune import PruningReport, prune_
from ..data.datasets import unlabeled_images
from ..runs.provenance import command_line, commands_of, teacher_source, weights_source

_KEPT = ("plan", "calibration", "imported")
_UNITS = {"mults": "multiplications", "adds": "additions", "params": "parameters", "energy": "energy, fp32, µJ"}


@dataclasses.dataclass(frozen=True)
class PruningJob:
    """What to prune and how; see the options of ``adderkit prune``."""

    model: str
    config: PruneConfig
    output: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    images: int = 512
    checkpoint: str | None = None
    pretrained: bool = True
    num_classes: int | None = None
    in_chans: int | None = None

    @property
    def folder(self) -> Path:
        """``--output``, or ``<model>-pruned`` in the current folder."""
        return default_folder(self.model, "-pruned") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class PruningResult:
    """What was done; ``folder`` is ``None`` after a dry run."""

    report: PruningReport
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {**self.report.to_dict(), "output": str(self.folder) if self.folder else None}

    def summary(self) -> str:
        """What a person wants to know last."""
        before, after = (sum(getattr(row, when) for row in self.report.groups) for when in ("before", "after"))
        lines = [f"{before - after} of {before} channels removed"]
        if self.report.not_folded:
            lines.append(f"behind {', '.join(self.report.not_folded[:3])} nothing takes up the mean of what was lost")
        if self.folder is None:
            lines.append("nothing was written (--dry-run)")
        elif self.report.images == 0:
            lines.append(
                f"saved in {self.folder}/ with the BatchNorm statistics of the whole network: its accuracy is near "
                "chance until you fine-tune it, or prune with --dataset"
            )
        else:
            lines.append(f"saved in {self.folder}/, BatchNorm measured on {self.report.images} images")
        return "; ".join(lines)


def run_pruning(job: PruningJob, *, dry_run: bool, announce: Callable[[str], None]) -> PruningResult:
    """Carry out a pruning.

    Args:
        job: What to prune and how.
        dry_run: Do everything but write.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be had, or nothing can be removed as asked.
    """
    check_target(job.model, job.folder, write=not dry_run, checkpoint=job.checkpoint)
    if job.config.importance in NEED_IMAGES and job.dataset is None:
        raise ModelSourceError(
            f"importance {job.config.importance} is measured on unlabeled images: give --dataset, "
            "or --importance batchnorm|magnitude|random"
        )
    wanted = {"num_classes": job.num_classes, "in_chans": job.in_chans}
    model = build_model(job.model, pretrained=job.pretrained, checkpoint=job.checkpoint, **wanted)
    images: Tensor | None = None
    if job.dataset is not None:
        announce(f"pruning {job.model} by {job.config.importance} on {job.images} unlabeled images of {job.dataset}")
        images = unlabeled_images(job.dataset, job.data_dir, model, job.images, seed=job.config.seed)
    report = prune_(model, job.config, images)
    if dry_run:
        return PruningResult(report, None)
    save(model, job.folder, _facts(job, model, report))
    return PruningResult(report, job.folder)


def pruning_tables(report: PruningReport) -> list[Table]:
    """A row for each group of layers that share channels, then what the whole costs before and after."""
    groups = Table(title="channels", title_justify="left")
    for column, side in (("layers", "left"), ("before", "right"), ("after", "right"), ("stays because of", "left")):
        groups.add_column(column, justify=side)  # type: ignore[arg-type]
    for row in report.groups:
        more = f" and {len(row.layers) - 1} more" if len(row.layers) > 1 else ""
        groups.add_row(escape(row.layers[0]) + more, str(row.before), str(row.after), escape(row.reason or ""))
    total = Table(title="for one image", title_justify="left")
    for column in ("", "before", "after", "left"):
        total.add_column(column, justify="right" if column else "left")
    for name, title in _UNITS.items():
        before, after = (values[name] / (1e6 if name == "energy" else 1) for values in (report.before, report.after))
        form = ",.1f" if name == "energy" else ",.0f"
        share = f"{after / before:.1%}".replace("%", " %") if before else ""
        total.add_row(title, f"{before:{form}}", f"{after:{form}}", share)
    return [groups, total]


def _facts(job: PruningJob, model: nn.Module, report: PruningReport) -> dict[str, Any]:
    """What ``adder_report.json`` is to know: what the folder said before, and the pruning."""
    known = read_report(job.model.removeprefix("local-dir:")) if is_folder(job.model) else {}
    return {
        **{key: known[key] for key in _KEPT if key in known},
        "pruning": report.to_dict(),
        "teacher": known.get("teacher")
        or teacher_source(job.model, model, pretrained=job.pretrained, checkpoint=job.checkpoint),
        "source": weights_source(job.model, model, pretrained=job.pretrained, checkpoint=job.checkpoint),
        "commands": commands_of(known, command_line()),
    }
