"""The facts about a saved model that its report page shows.

The model itself is loaded, so its layers and their cost are certain. Everything else comes from ``adder_report.json``
and ``summary.csv``, which somebody else may have written: values of an unexpected form are ignored, and local paths are
shortened.
"""

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...convert.checkpoint.configuration import base_architecture
from ...convert.checkpoint.folder import load
from ...convert.checkpoint.report import Report, SavedModel
from ...convert.conversion.targets import is_converted, target_of
from ...convert.cost.cost import cost
from ...convert.cost.report import Cost
from ...convert.errors import AdderkitError
from ...convert.model_source import ModelSource
from ...convert.record import transforms_of
from ..configs.files import read_text
from ..configs.recipe import Recipe
from ..runs.provenance import command_without_local_paths, part_of, without_local_paths
from ..training.models import Job, teacher_of
from .evaluations import Evaluation, evaluations_of
from .examples import Examples, find_examples

_EXTREME = 1e30  # larger than any loss, rate or accuracy
_EPOCHS = 10_000  # more than any run has
_ENTRIES = 100  # read at most, from a list that somebody else may have written


class LayerFact(NamedTuple):
    """A convolution of the model, or a layer that a conversion made of one.

    Args:
        path: Module path.
        layer: Module at that path.
        reason: Reason for converting or keeping it, from the plan in the report; empty if none is recorded.
        fidelity: Correlation of its output with the convolution's after calibration: mean, and worst channel.
    """

    path: str
    layer: nn.Conv2d
    reason: str
    fidelity: tuple[float, float] | None

    @property
    def target(self) -> str | None:
        """The target that the layer was converted to; ``None`` for a convolution."""
        target = target_of(self.layer)
        return None if target is None else target.name


@dataclasses.dataclass(frozen=True)
class ReportFacts:
    """Everything that a report page shows.

    Args:
        name: Name of the folder, with that of its run.
        base: Architecture in timm's registry.
        converted: Whether the model holds converted layers.
        pruned: Whether channels were removed.
        pruning: Settings of the last pruning and the number of images used, from the report.
        prices: Cost before and after the last pruning, by quantity, from the report.
        cost: Cost of the model for one image.
        layers: Convolutions of the model, and the layers that a conversion made of them.
        evaluations: Measurements on these weights.
        teacher_evaluations: Measurements on the teacher's weights.
        epochs: Rows of the run's ``summary.csv``; empty for a model outside a run folder.
        calibration: Settings of the calibration, from the report; empty for a model that was not calibrated.
        training: Recipe and progress of the training, from the report; empty for a model that was not trained.
        versions: Versions of the packages that saved the model.
        commands: Command lines that made the model.
        digest: SHA-256 of the weights.
        examples: Predictions on images; ``None`` without a data set.
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
    job: Job,
    data: Recipe | None = None,
    *,
    device: torch.device,
    announce: Callable[[str], None],
) -> ReportFacts:
    """Load a model, count its cost, read its report, and predict images of a data set.

    Args:
        job: Saved folder and, optionally, the teacher to compare with.
        data: Data set and split whose images are predicted; ``None`` for no predictions.
        device: Device to predict on.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The folder is not a complete checkpoint, or the data set or the given teacher cannot be loaded.
    """
    source = job.source.folder or Path(job.source.name)
    model, saved = load(source), SavedModel.load(source)
    report, examples = saved.report, None
    if data is not None:
        announce(f"predicting images of {data.dataset}")
        examples = find_examples(model.to(device), job, data)
    return ReportFacts(
        name=_name(source.resolve()),
        base=base_architecture(model),
        converted=is_converted(model),
        pruned=any(transform["kind"] == "prune" for transform in transforms_of(model)),
        pruning=_flat({**part_of(report.pruning, "config"), "images": report.pruning.get("images")}),
        prices=_prices(report.pruning),
        cost=cost(model),
        layers=_layers(model, report),
        evaluations=evaluations_of(report, saved.digest)[:_ENTRIES],
        teacher_evaluations=_evaluations_of_teacher(job),
        epochs=_epochs(source.resolve().parent),
        calibration=_flat({**report.calibration, **part_of(report.calibration, "config")}),
        training=_flat({**part_of(report.training, "recipe"), **report.training}),
        versions=_flat(report.versions),
        commands=[command_without_local_paths(each) for each in report.commands[:_ENTRIES]],
        digest=saved.digest,
        examples=examples,
    )


def _name(folder: Path) -> str:
    """Return the name of a folder, preceded by that of its run for a folder in a run."""
    run = folder.parent
    return f"{run.name}/{folder.name}" if (run / "args.yaml").is_file() else folder.name


def number(value: object) -> float | None:
    """Return a finite number of a plausible size; ``None`` for anything else that somebody may have written."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -_EXTREME < value < _EXTREME else None


def _layers(model: nn.Module, report: Report) -> tuple[LayerFact, ...]:
    """Return the layers of the model with what the report says about each; other layers in the report are ignored."""
    planned, fitted = _by_path(report.plan.get("rows")), _by_path(report.calibration.get("layers"))
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            row, fit = planned.get(path, {}), fitted.get(path, {})
            agreed = (row.get("decision") in ("convert", "converted")) == (target_of(module) is not None)
            reason = row.get("reason") if agreed else "changed after the plan was made"
            mean, worst = number(fit.get("correlation")), number(fit.get("worst"))
            fidelity = (mean, worst) if mean is not None and worst is not None else None
            found.append(LayerFact(path, module, reason if row and isinstance(reason, str) else "", fidelity))
    return tuple(found)


def _prices(pruning: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the counts of a pruning before and after, where both are numbers."""
    before, after = part_of(pruning, "before"), part_of(pruning, "after")
    found = {key: (number(before.get(key)), number(after.get(key))) for key in ("mults", "adds", "params", "energy")}
    return {key: (first, last) for key, (first, last) in found.items() if first is not None and last is not None}


def _by_path(rows: object) -> dict[str, Mapping[str, Any]]:
    found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    return {row["path"]: row for row in found if isinstance(row.get("path"), str)}


def _flat(values: Mapping[str, Any]) -> dict[str, str | float]:
    """Return the texts and numbers among settings, with local paths shortened."""
    plain = {key: value for key, value in values.items() if isinstance(value, str) or number(value) is not None}
    return {key: without_local_paths(value) for key, value in list(plain.items())[:_ENTRIES]}


def _evaluations_of_teacher(job: Job) -> list[Evaluation]:
    """Return the measurements on a teacher that is a folder on this machine."""
    try:
        name = teacher_of(job)
        folder = None if name is None else ModelSource(name).folder
        if folder is None:
            return []
        saved = SavedModel.load(folder)
        return evaluations_of(saved.report, saved.digest)[:_ENTRIES]
    except (AdderkitError, OSError, ValueError):  # it was moved, would be downloaded, or is no valid path
        return []


def _epochs(run: Path) -> list[dict[str, float]]:
    """Return the numbers in a run's ``summary.csv``; empty for a folder that is not a run."""
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
