"""Measured accuracy in a saved folder's report: written there by ``evaluate --record``, read by ``publish``."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ...convert.checkpoint.folder import CONFIG, REPORT, WEIGHTS, read_report
from ...convert.errors import AdderkitError
from ...convert.files import sha256, write_json
from ..runs.provenance import command_line, part_of
from ..training.evaluate import Metrics

# The Hub's names of the data sets that have another one here; "imagefolder" is what it calls any folder of classes.
_ON_THE_HUB = {"fashion-mnist": "zalando-datasets/fashion_mnist"}
_FOLDER = "imagefolder"
_MOST_IMAGES = 10**12


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Args:
        dataset: As ``--dataset`` names it.
        split: Of the data set.
        images: Number of images.
        top1: Percent right; ``top5`` likewise among the best five.
        top5: See ``top1``.
        command: The command line that measured it, where one did.
    """

    dataset: str
    split: str
    images: int
    top1: float
    top5: float
    command: str | None = None


def record_evaluation(folder: Path, dataset: str, split: str, metrics: Metrics) -> None:
    """Add a measurement to ``adder_report.json``; one of the same data set and split is replaced.

    It carries the SHA-256 of the weights, so that it counts for these alone.

    Args:
        folder: A saved model, see ``check_recordable``.
        dataset: As ``--dataset`` names it.
        split: Of the data set.
        metrics: What was found.
    """
    report = read_report(folder)
    entry = {
        "dataset": dataset,
        "split": split,
        **metrics.to_dict(),
        "command": command_line(),
        "sha256": sha256(folder / WEIGHTS),
    }
    others = [each for each in _entries(report) if (each.get("dataset"), each.get("split")) != (dataset, split)]
    write_json(folder / REPORT, {**report, "evaluations": [*others, entry]})


def check_recordable(folder: Path, checkpoint: str | None = None) -> None:
    """Refuse, before the work, a folder to which nothing may be added.

    Args:
        folder: The saved model.
        checkpoint: Other weights to evaluate instead of its own.

    Raises:
        AdderkitError: It is no saved folder, other weights are evaluated, or the files are guarded by checksums, as
            those of a run's ``last/`` are.
    """
    if not (folder / CONFIG).is_file() or checkpoint is not None:
        raise AdderkitError(
            f"--record writes into a saved folder, and {folder} with its own weights is none; leave it out"
        )
    if (folder / "state").exists():
        raise AdderkitError(
            f"{folder} is what a run resumes from, guarded by checksums, so nothing can be recorded in it; "
            "evaluate best/ beside it, or a copy without state/ and checksums.json"
        )


def evaluations_of(report: Mapping[str, Any], digest: str) -> list[Evaluation]:
    """What was measured on the weights with this SHA-256: recorded evaluations, else those of the training.

    Args:
        report: ``adder_report.json`` of the model.
        digest: Of its weights.
    """
    recorded = entries_of(report, digest)
    if not recorded:
        dataset = part_of(part_of(report, "training"), "recipe").get("dataset")
        measured = part_of(report, "metrics")
        recorded = [{**part_of(measured, split), "dataset": dataset, "split": split} for split in measured]
    return [found for each in recorded if (found := _evaluation(each)) is not None]


def _evaluation(entry: Mapping[str, Any]) -> Evaluation | None:
    """An entry as it was recorded; ``None`` for what somebody else made of it."""
    dataset, split, images, command = (entry.get(key) for key in ("dataset", "split", "images", "command"))
    top1, top5 = _percentage(entry.get("top1")), _percentage(entry.get("top5"))
    if not isinstance(dataset, str) or not isinstance(split, str) or not (dataset and (dataset + split).isprintable()):
        return None
    if type(images) is not int or not 0 <= images < _MOST_IMAGES or top1 is None or top5 is None:
        return None
    return Evaluation(dataset, split, images, top1, top5, command if isinstance(command, str) else None)


def _percentage(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and 0 <= value <= 100 else None


def entries_of(report: Mapping[str, Any], digest: str) -> list[dict[str, Any]]:
    """The recorded evaluations of the weights with this SHA-256, as ``record_evaluation`` wrote them."""
    return [each for each in _entries(report) if each.get("sha256") == digest]


def hub_dataset(name: str) -> str | None:
    """The Hub's name of a data set; ``None`` where it has none."""
    if match := re.fullmatch(r"hfds/([\w.-]+(?:/[\w.-]+)?)", name, re.ASCII):
        return match[1]
    return _ON_THE_HUB.get(name)


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """A measurement as a model card's ``model-index`` has it: accuracy as a fraction."""
    identifier = hub_dataset(evaluation.dataset) or (_FOLDER if evaluation.dataset == "folder" else evaluation.dataset)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=identifier,
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(value / 100, 6),
        )
        for name, value in (("top-1 accuracy", evaluation.top1), ("top-5 accuracy", evaluation.top5))
    ]


def _entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = report.get("evaluations")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
