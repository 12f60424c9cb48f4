"""Write the report page of a saved model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...convert.errors import AdderkitError
from ...convert.files import write_text
from ...convert.model_source import ModelSource
from ...convert.output import check_output_file
from ..configs.recipe import Recipe
from ..distributed.device import compute_device
from ..training.models import Job
from .facts import ReportFacts, gather
from .page import page


@dataclasses.dataclass(frozen=True)
class ReportJob:
    """A model to report on, and how.

    Args:
        folder: Folder of the saved model.
        output: HTML file to write; by default ``<folder>-report.html`` beside the folder, whose own files may be
            protected by checksums.
        data: Data set and split whose images are predicted; ``None`` for no predictions.
        teacher: Model to compare with; by default the teacher that the folder records.
        teacher_checkpoint: File or folder of weights of that model.
        overwrite: Replace an earlier page.
        device: Device to predict on; by default the GPU, if there is one.
    """

    folder: str
    output: str | None = None
    data: Recipe | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    overwrite: bool = False
    device: str | None = None

    @property
    def source(self) -> Path:
        """Folder of the saved model."""
        return ModelSource(self.folder).folder or Path(self.folder)

    @property
    def target(self) -> Path:
        """File to write."""
        source = self.source.resolve()
        return Path(self.output) if self.output is not None else source.with_name(f"{source.name}-report.html")


@dataclasses.dataclass(frozen=True)
class ReportResult:
    """Page that was written, and the facts on it."""

    facts: ReportFacts
    target: Path

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        facts, examples = self.facts, self.facts.examples
        return {
            "output": str(self.target),
            "bytes": self.target.stat().st_size,
            "converted_layers": sum(layer.target is not None for layer in facts.layers),
            "convolutions": len(facts.layers),
            "evaluations": len(facts.evaluations),
            "epochs": len(facts.epochs),
            "examples": len(examples.first) + len(examples.differing) if examples else 0,
            "compared_images": examples.images if examples else 0,
            "agreeing": examples.agreeing if examples else None,
        }

    def summary(self) -> str:
        """Return the lines to print at the end."""
        lines = [f"report: {self.target} ({self.target.stat().st_size:,} bytes)"]
        if not self.facts.evaluations:
            lines.append("accuracy was not measured; adderkit evaluate DIR --dataset … --record adds it to the report")
        if self.facts.examples is None:
            lines.append("no example predictions; add some with --dataset NAME")
        elif self.facts.examples.no_teacher:
            lines.append(f"no predictions of a teacher: {self.facts.examples.no_teacher}")
        return "\n".join(lines)


def run_report(job: ReportJob, announce: Callable[[str], None]) -> ReportResult:
    """Write the page.

    Args:
        job: Model to report on, and how.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is not a complete checkpoint, the data set or the given teacher cannot be loaded, or
            the page cannot be written.
    """
    _check_places(job)
    with compute_device(job.device) as device:
        models = Job(ModelSource(job.folder), job.teacher, job.teacher_checkpoint)
        facts = gather(models, job.data, device=device, announce=announce)
    try:
        write_text(job.target, page(facts))
    except OSError as error:
        raise AdderkitError(f"cannot write --output {job.target}: {error.strerror or error}") from error
    return ReportResult(facts, job.target)


def _check_places(job: ReportJob) -> None:
    source, target = job.source, job.target
    if (source / "args.yaml").is_file() and (source / "best").is_dir():
        raise AdderkitError(f"{source} is a run folder; report on its best model: {source / 'best'}")
    check_output_file(f"--output {target}", target, (".html", ".htm"), "'.html'", overwrite=job.overwrite)
    guarded = next((parent for parent in target.absolute().parents if (parent / "checksums.json").is_file()), None)
    if guarded is not None:
        raise AdderkitError(
            f"--output {target} is inside {guarded}, which is protected by checksums; give a file outside it"
        )
