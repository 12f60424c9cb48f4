"""All that is known of a saved model, gathered for one page that people read and pass on.

The model is loaded as everywhere, so what it computes is known for certain: its layers and their cost. All else comes
from ``adder_report.json`` and ``summary.csv``, which somebody else may have written; it is taken as far as it has the
form that we write, and paths of this machine are left out.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...adder_layers.conv import AdderConv2d
from ...convert.checkpoint.folder import WEIGHTS, base_architecture, load, read_report
from ...convert.conversion.targets import is_converted
from ...convert.cost.cost import cost
from ...convert.cost.report import Cost
from ...convert.errors import AdderkitError
from ...convert.files import sha256
from ...convert.model_source import ModelSource
from ...convert.record import transforms_of
from ..configs.files import read_text
from ..runs.provenance import command_without_local_paths, commands_of, part_of, without_local_paths
from ..training.models import Job, teacher_of
from .evaluations import Evaluation, evaluations_of
from .examples import Examples, find_examples

_EXTREME = 1e30  # no loss, rate or accuracy is larger
_EPOCHS = 10_000  # more than any run has
_ENTRIES = 100  # of a list that somebody else may have written


class LayerFact(NamedTuple):
    """A convolution or adder layer of the model.

    Args:
        path: Module path.
        layer: The module.
        reason: Why it was converted or kept, as the plan in the report says; empty where it says nothing.
        fidelity: Correlation of its output with the convolution's after calibration, and that of its worst channel.
    """

    path: str
    layer: nn.Conv2d
    reason: str
    fidelity: tuple[float, float] | None

    @property
    def adder(self) -> bool:
        """Whether it is an adder layer."""
        return isinstance(self.layer, AdderConv2d)


@dataclasses.dataclass(frozen=True)
class ReportFacts:
    """All that a page says.

    Args:
        name: Of the folder, with that of its run.
        base: Architecture in timm's registry.
        converted: Whether the model is an adder network.
        pruned: Whether it lost channels.
        pruning: Settings of its last pruning and the images it was measured on, as noted in ``adder_report.json``.
        prices: What the model cost before and after it, by what is counted, likewise.
        cost: Of the model, for one image.
        layers: Its convolutions and adder layers.
        evaluations: What was measured on these weights.
        teacher_evaluations: What was measured on the teacher's.
        epochs: Rows of the run's ``summary.csv``; empty where the model lies in no run.
        calibration: Settings of the calibration, as noted in ``adder_report.json``; empty where there was none.
        training: How far the training came, and its recipe, likewise.
        versions: Of the packages that saved the model.
        commands: That made the model.
        digest: SHA-256 of the weights.
        examples: Predictions, where a data set was given.
    """

    name: str
    base: str
    converted: bool
    pruned: bool
    pruning: Mapping[str, str | float]
    prices: Mapping[str, tuple[float, float]]
    cost: Cost
    layers: tuple[LayerFact, ...]
    evaluations: Sequence[Evaluation]
    teacher_evaluations: Sequence[Evaluation]
    epochs: Sequence[Mapping[str, float]]
    calibration: Mapping[str, str | float]
    training: Mapping[str, str | float]
    versions: Mapping[str, str | float]
    commands: Sequence[str]
    digest: str
    examples: Examples | None


def gather(
    job: Job, dataset: str | None = None, data_dir: str | None = None, *, announce: Callable[[str], None]
) -> ReportFacts:
    """Load the model, count its cost, read what was noted, and let it predict.

    Args:
        job: Saved folder and, where it is named, teacher.
        dataset: Whose images are predicted; ``None`` for none.
        data_dir: Where these are.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is no whole checkpoint, or the data set or a teacher that was named cannot be had.
    """
    source = job.source.folder or Path(job.source.name)
    model, saved = load(source), read_report(source)
    pruning = part_of(saved, "pruning")
    digest, examples = sha256(source / WEIGHTS), None
    if dataset is not None:
        announce(f"predicting images of {dataset}")
        examples = find_examples(model, job, dataset, data_dir)
    return ReportFacts(
        name=_name(source.resolve()),
        base=base_architecture(model),
        converted=is_converted(model),
        pruned=any(transform["kind"] == "prune" for transform in transforms_of(model)),
        pruning=_flat({**part_of(pruning, "config"), "images": pruning.get("images")}),
        prices=_prices(pruning),
        cost=cost(model),
        layers=_layers(model, saved),
        evaluations=evaluations_of(saved, digest)[:_ENTRIES],
        teacher_evaluations=_evaluations_of_teacher(teacher_of(job)),
        epochs=_epochs(source.resolve().parent),
        calibration=_flat({**part_of(saved, "calibration"), **part_of(part_of(saved, "calibration"), "config")}),
        training=_flat({**part_of(part_of(saved, "training"), "recipe"), **part_of(saved, "training")}),
        versions=_flat(part_of(saved, "versions")),
        commands=[command_without_local_paths(each) for each in commands_of(saved, None)[:_ENTRIES]],
        digest=digest,
        examples=examples,
    )


def _name(folder: Path) -> str:
    """Of the folder; with that of the run, where it lies in one."""
    run = folder.parent
    return f"{run.name}/{folder.name}" if (run / "args.yaml").is_file() else folder.name


def number(value: object) -> float | None:
    """A finite number of a size that occurs; ``None`` for anything else that somebody may have written."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -_EXTREME < value < _EXTREME else None


def _layers(model: nn.Module, saved: Mapping[str, Any]) -> tuple[LayerFact, ...]:
    """What the model has, with what the report says of it; what that says of other layers is left out."""
    planned, fitted = (
        _by_path(part_of(saved, key).get(rows)) for key, rows in (("plan", "rows"), ("calibration", "layers"))
    )
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            row, fit = planned.get(path, {}), fitted.get(path, {})
            agreed = (row.get("decision") in ("convert", "converted")) == isinstance(module, AdderConv2d)
            reason = row.get("reason") if agreed else "changed after it was planned"
            mean, worst = number(fit.get("correlation")), number(fit.get("worst"))
            fidelity = (mean, worst) if mean is not None and worst is not None else None
            found.append(LayerFact(path, module, reason if row and isinstance(reason, str) else "", fidelity))
    return tuple(found)


def _prices(pruning: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What a pruning counted before and after, as far as both are numbers."""
    before, after = part_of(pruning, "before"), part_of(pruning, "after")
    found = {key: (number(before.get(key)), number(after.get(key))) for key in ("mults", "adds", "params", "energy")}
    return {key: (first, last) for key, (first, last) in found.items() if first is not None and last is not None}


def _by_path(rows: object) -> dict[str, Mapping[str, Any]]:
    found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return {row["path"]: row for row in found if isinstance(row.get("path"), str)}


def _flat(values: Mapping[str, Any]) -> dict[str, str | float]:
    """The texts and numbers among settings, without paths of this machine."""
    plain = {key: value for key, value in values.items() if isinstance(value, str) or number(value) is not None}
    return {key: without_local_paths(value) for key, value in list(plain.items())[:_ENTRIES]}


def _evaluations_of_teacher(name: str | None) -> list[Evaluation]:
    """What was measured on the teacher, where it is a folder on this machine."""
    try:
        folder = None if name is None else ModelSource(name).folder
        if folder is None:
            return []
        return evaluations_of(read_report(folder), sha256(folder / WEIGHTS))[:_ENTRIES]
    except (AdderkitError, OSError, ValueError):  # it moved, or its name is none
        return []


def _epochs(run: Path) -> list[dict[str, float]]:
    """The rows of a run's ``summary.csv``, as far as they are numbers; empty where there is no run."""
    if not (run / "args.yaml").is_file() or not (run / "summary.csv").is_file():
        return []
    try:
        rows = list(csv.DictReader(read_text(run / "summary.csv").splitlines()))[:_EPOCHS]
    except (AdderkitError, csv.Error):
        return []
    found = [{key: _parsed(value) for key, value in row.items() if key} for row in rows]
    return [row for row in found if math.isfinite(row.get("epoch", math.nan))]


def _parsed(text: object) -> float:
    try:
        value = number(float(text)) if isinstance(text, str) else None
    except ValueError:
        value = None
    return math.nan if value is None else value
