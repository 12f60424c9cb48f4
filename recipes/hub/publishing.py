"""Publish a saved model on the Hugging Face Hub.

The published folder is built beside the saved one, which is not changed. It has the same weights and configuration, a
full model card with figures, and a report with costs, commands and measurements but without local paths.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...convert.checkpoint.configuration import base_architecture
from ...convert.checkpoint.folder import CARD, CONFIG, WEIGHTS, has_edited_card, load
from ...convert.checkpoint.report import REPORT, Report, SavedModel, read_report, write_report
from ...convert.conversion.targets import is_converted
from ...convert.cost.cost import cost
from ...convert.cost.report import Cost
from ...convert.errors import PublishError
from ...convert.files import atomic_path, write_text
from ...convert.model_source import ModelSource
from ...convert.output import FolderKind, output_folder
from ...convert.record import transforms_of
from ..reporting.cost_image import draw_chart
from ..reporting.evaluations import entries_of, evaluations_of
from ..runs.kept_teacher import TEACHER
from ..runs.provenance import command_without_local_paths, without_local_paths
from .card_check import check_card
from .licenses import base_model_of, license_of
from .published_card import CardFacts, published_card
from .upload import Target, Upload, upload

_PICTURES = "images"
_CHART = f"{_PICTURES}/cost.png"


@dataclasses.dataclass(frozen=True)
class PublishJob:
    """A model to publish, and how.

    Args:
        folder: Folder of the saved model.
        target: Repository on the Hub.
        output: Folder to build; by default the repository's name with ``-published``, in the working directory.
        license: License identifier; by default the one that the pretrained weights state.
        base_model: Hub repository of the model that it was made from; by default as recorded.
        force: Replace a model card that was edited, in the built folder and on the Hub.
        dry_run: Build the folder without uploading it.
    """

    folder: str
    target: Target
    output: str | None = None
    license: str | None = None
    base_model: str | None = None
    force: bool = False
    dry_run: bool = False

    @property
    def source(self) -> Path:
        """Folder of the saved model."""
        return ModelSource(self.folder).folder or Path(self.folder)

    @property
    def built(self) -> Path:
        """Folder to build."""
        return Path(self.output or f"{self.target.repository.split('/')[1]}-published")


@dataclasses.dataclass(frozen=True)
class PublishResult:
    """Outcome of publishing.

    Args:
        target: Repository on the Hub.
        folder: Folder that was built.
        files: Paths in it with their sizes in bytes.
        evaluations: Number of measurements in the model card.
        upload: Outcome of the upload; ``None`` after a dry run.
    """

    target: Target
    folder: Path
    files: Mapping[str, int]
    evaluations: int
    upload: Upload | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "repository": self.target.repository,
            "output": str(self.folder),
            "files": [{"path": path, "bytes": size} for path, size in self.files.items()],
            "upload": dataclasses.asdict(self.upload) if self.upload else None,
        }

    def summary(self) -> str:
        """Return the lines to print at the end."""
        rows = [f"{size:>14,}  {path}" for path, size in self.files.items()]
        lines = [*rows, f"{sum(self.files.values()):>14,}  bytes in {self.folder}/"]
        if not self.evaluations:
            lines.append("accuracy was not measured; adderkit evaluate DIR --dataset … --record adds it to the card")
        if self.upload is None:
            lines.append(f"to be uploaded to {self.target.repository}; nothing was sent (--dry-run)")
        elif self.upload.sent:
            lines.append(f"sent {', '.join(self.upload.sent)}: {self.upload.url}")
        else:
            lines.append(f"{self.target.repository} is up to date; nothing was sent")
        if self.upload is not None and self.upload.card_kept:
            lines.append(f"{self.target.repository} has a different {CARD}, which was kept; --force replaces it")
        return "\n".join(lines)


def run_publish(job: PublishJob, announce: Callable[[str], None]) -> PublishResult:
    """Build the folder and, unless it is a dry run, upload it.

    Args:
        job: Model to publish, and how.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is not a complete checkpoint, its license is unknown, or the Hub refuses it.
    """
    _check_places(job)
    model = load(job.source)
    announce(f"building {job.built}/")
    with output_folder(job.built, _copy_of(job.target.repository), overwrite=True):
        files, evaluations = _build(job, model, announce)
    check_card(job.built / CARD)
    done = None
    if not job.dry_run:
        announce(f"uploading to {job.target.repository}")
        done = upload(job.built, list(files), job.target, overwrite_card=job.force, announce=announce)
    return PublishResult(job.target, job.built, files, evaluations, done)


def _check_places(job: PublishJob) -> None:
    source, built = job.source, job.built
    if (source / "args.yaml").is_file() and (source / "best").is_dir():
        raise PublishError(f"{source} is a run folder; publish its best model: {source / 'best'}")
    if built.resolve() == source.resolve():
        raise PublishError(f"--output {built} is the model itself, which is not changed; give another folder")


def _copy_of(repository: str) -> FolderKind:
    """Return the kind of folder that is built for a repository; an earlier build is updated."""
    return FolderKind(f"a copy of {repository}", lambda folder: read_report(folder).repository == repository)


def _build(job: PublishJob, model: nn.Module, announce: Callable[[str], None]) -> tuple[dict[str, int], int]:
    """Write the folder; return its files with their sizes, and the number of measurements in the card."""
    source, built = job.source, job.built
    saved = SavedModel.load(source)
    license = license_of(job.license, saved.report, saved.config, announce)
    base_model, found = base_model_of(job.base_model, saved.report), cost(model)
    evaluations = evaluations_of(saved.report, saved.digest)
    report = dataclasses.replace(_report(job, saved, found), license=str(license), base_model=base_model)
    keeps_card = has_edited_card(built) and not job.force
    try:
        pictures = _pictures(job, found)
        facts = CardFacts(
            repository=job.target.repository,
            base=base_architecture(model),
            converted=is_converted(model),
            pruned=any(transform["kind"] == "prune" for transform in transforms_of(model)),
            license=license,
            base_model=base_model,
            cost=found,
            evaluations=evaluations,
            report=report,
            pictures=pictures,
            chart=_CHART,
        )
        _copy(source / WEIGHTS, built / WEIGHTS)
        _copy(source / CONFIG, built / CONFIG)
        if keeps_card:
            announce(f"{built / CARD} was edited and is kept; --force replaces it")
            write_report(built, report)
        else:
            (built / CARD).unlink(missing_ok=True)  # a kill must not leave a card that seems to be edited
            card = published_card(facts)
            write_report(built, dataclasses.replace(report, card_sha256=hashlib.sha256(card.encode()).hexdigest()))
            write_text(built / CARD, card)
    except OSError as error:
        raise PublishError(f"cannot write --output {built}: {error.strerror or error}") from error
    names = (CARD, CONFIG, WEIGHTS, REPORT, _CHART, *pictures)
    return {name: (built / name).stat().st_size for name in names}, len(evaluations)


def _report(job: PublishJob, saved: SavedModel, found: Cost) -> Report:
    """Return the report to publish: that of the saved folder without local paths, and the cost."""
    report = saved.report
    evaluations = [
        {**each, "command": command_without_local_paths(command)}
        if isinstance(command := each.get("command"), str)
        else each
        for each in entries_of(report, saved.digest)
    ]
    bare = dataclasses.replace(report, commands=(), evaluations=(), data={})
    return dataclasses.replace(
        Report.from_dict(without_local_paths(bare.to_dict())),
        teacher=None if report.teacher == TEACHER else without_local_paths(report.teacher),
        repository=job.target.repository,
        cost=found.to_dict(),
        evaluations=tuple(evaluations),
        commands=tuple(map(command_without_local_paths, report.commands)),
        sha256=saved.digest,
    )


def _pictures(job: PublishJob, found: Cost) -> list[str]:
    """Draw the cost chart and copy the training curves of the model's run; return the paths of the curves."""
    target = job.built / _CHART
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_chart(found, target, job.target.repository.split("/")[1])
    run = job.source.resolve().parent
    if not (run / "args.yaml").is_file():
        return []
    curves = sorted(run.glob("plots/*.png"))
    for curve in curves:
        _copy(curve, target.parent / curve.name)
    return [f"{_PICTURES}/{curve.name}" for curve in curves]


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
