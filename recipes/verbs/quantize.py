"""The ``quantize`` verb's work: a saved model becomes an integer network beside it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ...convert.checkpoint.folder import read_report, save
from ...convert.cost.count import IntegerRow
from ...convert.cost.integer import integer_rows
from ...convert.errors import ModelSourceError
from ...convert.model_source import build_model, check_target, default_folder, is_folder
from ...convert.quantization.config import QuantizeConfig
from ...convert.quantization.quantize import quantize_with_ranges
from ...convert.quantization.ranges import Range
from ..data.datasets import unlabeled_images
from ..runs.provenance import command_line, commands_of, teacher_source, weights_source
from .inspect import integer_table

_KEPT = ("plan", "calibration", "pruning", "imported", "teacher")


@dataclasses.dataclass(frozen=True)
class QuantizationJob:
    """What to quantize and how; see the options of ``adderkit quantize``."""

    model: str
    config: QuantizeConfig
    output: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    images: int = 512
    seed: int = 0
    checkpoint: str | None = None
    pretrained: bool = True

    @property
    def folder(self) -> Path:
        """``--output``, or ``<model>-int8`` in the current folder."""
        return default_folder(self.model, f"-int{self.config.bits}") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class QuantizationResult:
    """What was done; ``folder`` is ``None`` after a dry run."""

    config: QuantizeConfig
    steps: tuple[IntegerRow, ...]
    ranges: tuple[Range, ...]
    images: int
    bytes_before: int
    bytes_after: int
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        known = {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}
        return {**known, "output": str(self.folder) if self.folder else None}

    def summary(self) -> str:
        """What a person wants to know last."""
        sizes = f"{self.bytes_before / 1e3:,.0f} kB of weights became {self.bytes_after / 1e3:,.0f} kB"
        if self.folder is None:
            return f"{len(self.steps)} integer steps, {sizes}; nothing was written (--dry-run)"
        return f"{len(self.steps)} integer steps, {sizes}, measured on {self.images} images; saved in {self.folder}/"


def run_quantization(job: QuantizationJob, *, dry_run: bool, announce: Callable[[str], None]) -> QuantizationResult:
    """Carry out a quantization.

    Args:
        job: What to quantize and how.
        dry_run: Do everything but write.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be had, or integers cannot express the model.
    """
    check_target(job.model, job.folder, write=not dry_run, checkpoint=job.checkpoint)
    if job.dataset is None:
        raise ModelSourceError("ranges are measured on unlabeled images: give --dataset")
    model = build_model(job.model, pretrained=job.pretrained, checkpoint=job.checkpoint)
    images = unlabeled_images(job.dataset, job.data_dir, model, job.images, seed=job.seed)
    announce(f"quantizing {job.model} on {len(images)} unlabeled images of {job.dataset}")
    network, ranges = quantize_with_ranges(model, images, job.config)
    sizes = [sum(each.numel() * each.element_size() for each in net.state_dict().values()) for net in (model, network)]
    folder = None if dry_run else job.folder
    result = QuantizationResult(
        job.config, tuple(integer_rows(network.plan)), tuple(ranges), len(images), sizes[0], sizes[1], folder
    )
    if folder is not None:
        before = read_report(job.model.removeprefix("local-dir:")) if is_folder(job.model) else {}
        known: dict[str, Any] = {"pretrained": job.pretrained, "checkpoint": job.checkpoint}
        report = {
            **{key: before[key] for key in _KEPT if key in before},
            "quantization": {"config": job.config.to_dict(), "images": len(images), "ranges": _rows(ranges)},
            "source": weights_source(job.model, model, **known),
            "commands": commands_of(before, command_line()),
        }
        report.setdefault("teacher", teacher_source(job.model, model, **known))
        save(network, folder, report)
    return result


def _rows(ranges: Sequence[Range]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(each) for each in ranges]


def quantization_tables(result: QuantizationResult) -> list[Table]:
    """The ranges that were chosen, and the steps."""
    tables = []
    if result.ranges:
        table = Table(title="ranges of the activations", title_justify="left")
        for column in ("written by", "rule"):
            table.add_column(column)
        for column in ("bits", "from", "to", "variance lost"):
            table.add_column(column, justify="right")
        for row in result.ranges:
            cells = (str(row.bits), f"{row.low:.3g}", f"{row.high:.3g}", f"{100 * row.error:.2f} %")
            table.add_row(escape(row.path) or "(image)", row.rule, *cells)
        tables.append(table)
    return [*tables, integer_table(result.steps)]
