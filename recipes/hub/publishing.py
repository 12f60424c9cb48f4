"""``adderkit publish``: a saved folder becomes one that timm and the Hub understand, and goes to the Hub.

The folder that is published is built beside the saved one, which stays as it is: the same weights and configuration, a
full model card with pictures, and a report with costs, commands and measurements but without paths of this machine.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...convert.checkpoint.folder import CARD, CONFIG, REPORT, WEIGHTS, base_architecture, load, read_report
from ...convert.conversion.targets import is_converted
from ...convert.cost.cost import cost
from ...convert.cost.report import Cost
from ...convert.errors import PublishError
from ...convert.files import atomic_path, read_json_object, sha256, write_json, write_text
from ...convert.model_source import ModelSource
from ...convert.record import transforms_of
from ..reporting.cost_chart import draw_chart
from ..reporting.evaluations import entries_of, evaluations_of
from ..runs.provenance import command_without_local_paths, commands_of, without_local_paths
from .licenses import base_model_of, license_of
from .published_card import CardFacts, published_card
from .upload import Target, Upload, upload

_PICTURES = "images"
_CHART = f"{_PICTURES}/cost.png"


@dataclasses.dataclass(frozen=True)
class PublishJob:
    """What to publish and where; see the options of ``adderkit publish``."""

    folder: str
    target: Target
    output: str | None = None
    license: str | None = None
    base_model: str | None = None
    force: bool = False
    dry_run: bool = False

    @property
    def source(self) -> Path:
        """The saved folder."""
        return ModelSource(self.folder).folder or Path(self.folder)

    @property
    def built(self) -> Path:
        """``--output``, or the repository's name with ``-published`` in the current folder."""
        return Path(self.output or f"{self.target.repository.split('/')[1]}-published")


@dataclasses.dataclass(frozen=True)
class PublishResult:
    """What was built, file by file in bytes, and what became of it; ``upload`` is ``None`` after a dry run."""

    target: Target
    folder: Path
    files: Mapping[str, int]
    evaluations: int
    upload: Upload | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "repository": self.target.repository,
            "output": str(self.folder),
            "files": [{"path": path, "bytes": size} for path, size in self.files.items()],
            "upload": dataclasses.asdict(self.upload) if self.upload else None,
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        rows = [f"{size:>14,}  {path}" for path, size in self.files.items()]
        lines = [*rows, f"{sum(self.files.values()):>14,}  bytes in {self.folder}/"]
        if not self.evaluations:
            lines.append("accuracy was not measured; adderkit evaluate DIR --dataset … --record puts it into the card")
        if self.upload is None:
            lines.append(f"this would go to {self.target.repository}; nothing was sent (--dry-run)")
        elif self.upload.sent:
            lines.append(f"sent {', '.join(self.upload.sent)}: {self.upload.url}")
        else:
            lines.append(f"{self.target.repository} has all of this already; nothing was sent")
        if self.upload is not None and self.upload.card_kept:
            lines.append(f"{self.target.repository} has another {CARD}, which was kept; --force replaces it")
        return "\n".join(lines)


def run_publish(job: PublishJob, announce: Callable[[str], None]) -> PublishResult:
    """Build the folder and, unless it is a dry run, upload it.

    Args:
        job: What to publish and where.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is no whole checkpoint, its license is not known, or the Hub refuses it.
    """
    _check_places(job)
    model = load(job.source)
    announce(f"building {job.built}/")
    files, evaluations = _build(job, model, announce)
    done = None
    if not job.dry_run:
        announce(f"uploading to {job.target.repository}")
        done = upload(job.built, list(files), job.target, overwrite_card=job.force, announce=announce)
    return PublishResult(job.target, job.built, files, evaluations, done)


def _check_places(job: PublishJob) -> None:
    source, built = job.source, job.built
    if (source / "args.yaml").is_file() and (source / "best").is_dir():
        raise PublishError(f"{source} is a run; publish its best model: {source / 'best'}")
    if built.resolve() == source.resolve():
        raise PublishError(f"--output {built} is the model itself, which stays as it is; name another folder")
    if built.exists() and not built.is_dir():
        raise PublishError(f"--output {built} is a file, expected a folder")
    if built.is_dir() and any(built.iterdir()) and read_report(built).get("repository") != job.target.repository:
        raise PublishError(
            f"--output {built} holds something else than {job.target.repository}; remove it, or name another folder"
        )


def _edited(built: Path) -> bool:
    """Whether the card of a folder that was built before is no longer the one that was written."""
    card = built / CARD
    return card.is_file() and sha256(card) != read_report(built).get("card_sha256")


def _build(job: PublishJob, model: nn.Module, announce: Callable[[str], None]) -> tuple[dict[str, int], int]:
    """Write the folder: the files in it with their sizes, and the number of measurements in the card."""
    source, built = job.source, job.built
    saved, config = read_report(source), read_json_object(source / CONFIG)
    license, base_model = license_of(job.license, saved, config), base_model_of(job.base_model, saved)
    found, digest = cost(model), sha256(source / WEIGHTS)
    evaluations = evaluations_of(saved, digest)
    report = _report(job, saved, found, digest) | {"license": str(license), "base_model": base_model}
    edited = _edited(built)
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
        if job.force or not edited:
            write_text(built / CARD, published_card(facts))
            report["card_sha256"] = sha256(built / CARD)
        else:
            announce(f"{built / CARD} was edited and is kept; --force replaces it")
        write_json(built / REPORT, report)
    except OSError as error:
        raise PublishError(f"--output {built} cannot be written: {error.strerror or error}") from error
    names = (CARD, CONFIG, WEIGHTS, REPORT, _CHART, *pictures)
    return {name: (built / name).stat().st_size for name in names}, len(evaluations)


def _report(job: PublishJob, saved: Mapping[str, Any], found: Cost, digest: str) -> dict[str, Any]:
    """What the saved folder says and what was counted, for other people's eyes."""
    known = {key: value for key, value in saved.items() if key not in ("evaluations", "commands")}
    return {
        **without_local_paths(known),
        "repository": job.target.repository,
        "cost": found.to_dict(),
        "evaluations": [
            {**each, "command": command_without_local_paths(command)}
            if isinstance(command := each.get("command"), str)
            else each
            for each in entries_of(saved, digest)
        ],
        "commands": [command_without_local_paths(each) for each in commands_of(saved, None)],
        "sha256": digest,
    }


def _pictures(job: PublishJob, found: Cost) -> list[str]:
    """Draw the cost chart and copy the training curves of the run that the model is from; the paths of the latter."""
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
