"""``adderkit report``: where the page is written, and what is said of it afterwards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...convert.errors import AdderkitError
from ...convert.files import check_file_target, write_text
from ...convert.model_source import ModelSource
from ..training.models import Job
from .facts import ReportFacts, gather
from .page import page


@dataclasses.dataclass(frozen=True)
class ReportJob:
    """What to report on; see the options of ``adderkit report``."""

    folder: str
    output: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    teacher: str | None = None

    @property
    def source(self) -> Path:
        """The saved folder."""
        return ModelSource(self.folder).folder or Path(self.folder)

    @property
    def target(self) -> Path:
        """``--output``, or ``<folder>-report.html`` beside the folder, whose files may be guarded by checksums."""
        source = self.source.resolve()
        return Path(self.output) if self.output is not None else source.with_name(f"{source.name}-report.html")


@dataclasses.dataclass(frozen=True)
class ReportResult:
    """The page that was written."""

    facts: ReportFacts
    target: Path

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        facts, examples = self.facts, self.facts.examples
        return {
            "output": str(self.target),
            "bytes": self.target.stat().st_size,
            "adder_layers": sum(layer.adder for layer in facts.layers),
            "convolutions": len(facts.layers),
            "evaluations": len(facts.evaluations),
            "epochs": len(facts.epochs),
            "examples": len(examples.first) + len(examples.differing) if examples else 0,
            "compared_images": examples.images if examples else 0,
            "agreeing": examples.agreeing if examples else None,
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        lines = [f"report: {self.target} ({self.target.stat().st_size:,} bytes, opens in any browser)"]
        if not self.facts.evaluations:
            lines.append(
                "accuracy was not measured; adderkit evaluate DIR --dataset … --record puts it into the report"
            )
        if self.facts.examples is None:
            lines.append("without predictions on examples; --dataset NAME shows some")
        elif self.facts.examples.no_teacher:
            lines.append(f"without the teacher's predictions: {self.facts.examples.no_teacher}")
        return "\n".join(lines)


def run_report(job: ReportJob, announce: Callable[[str], None]) -> ReportResult:
    """Write the page.

    Args:
        job: What to report on.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is no whole checkpoint, the data set or a teacher that was named cannot be had, or the
            page cannot be written.
    """
    _check_places(job)
    facts = gather(Job(ModelSource(job.folder), job.teacher), job.dataset, job.data_dir, announce=announce)
    try:
        write_text(job.target, page(facts))
    except OSError as error:
        raise AdderkitError(f"--output {job.target} cannot be written: {error.strerror or error}") from error
    return ReportResult(facts, job.target)


def _check_places(job: ReportJob) -> None:
    source, target = job.source, job.target
    if (source / "args.yaml").is_file() and (source / "best").is_dir():
        raise AdderkitError(f"{source} is a run; report on its best model: {source / 'best'}")
    check_file_target(f"--output {target}", target, (".html", ".htm"), "'.html'")
    guarded = next((parent for parent in target.absolute().parents if (parent / "checksums.json").is_file()), None)
    if guarded is not None:
        raise AdderkitError(
            f"--output {target} lies in {guarded}, which is guarded by checksums; name a place beside it"
        )
