"""Measured accuracy in the report of a saved folder: written by ``evaluate --record``, read by ``publish``."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ...convert.checkpoint.report import Report, SavedModel, write_report
from ...convert.checkpoint.weights import CONFIG
from ...convert.errors import AdderkitError
from ..runs.provenance import command_line, part_of
from ..training.evaluate import Metrics

# Names on the Hub of data sets that are called otherwise here; "imagefolder" is its name for any folder of classes.
_ON_THE_HUB = {"fashion-mnist": "zalando-datasets/fashion_mnist"}
_FOLDER = "imagefolder"
_MOST_IMAGES = 10**12


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One measurement.

    Args:
        dataset: Name of the data set, as given with ``--dataset``.
        split: Split of the data set.
        images: Number of images.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent.
        command: Command line that measured it; ``None`` for a measurement by Python code.
    """

    dataset: str
    split: str
    images: int
    top1: float
    top5: float
    command: str | None = None


def record_evaluation(folder: Path, dataset: str, split: str, metrics: Metrics) -> None:
    """Add a measurement to the report of a saved folder; one of the same data set and split is replaced.

    The entry carries the SHA-256 of the weights, so that it counts for these weights alone.

    Args:
        folder: Saved folder that passed ``check_recordable``.
        dataset: Name of the data set, as given with ``--dataset``.
        split: Split of the data set.
        metrics: Results of the evaluation.
    """
    saved = SavedModel.load(folder)
    entry = {
        "dataset": dataset,
        "split": split,
        **metrics.to_dict(),
        "command": command_line(),
        "sha256": saved.digest,
    }
    recorded = saved.report.evaluations
    others = (each for each in recorded if (each.get("dataset"), each.get("split")) != (dataset, split))
    write_report(folder, dataclasses.replace(saved.report, evaluations=(*others, entry)))


def check_recordable(folder: Path, checkpoint: str | None = None) -> None:
    """Refuse, before the evaluation, a folder in which nothing can be recorded.

    Args:
        folder: Folder of the saved model.
        checkpoint: Other weights to evaluate instead of the folder's own.

    Raises:
        AdderkitError: It is not a saved folder, other weights are evaluated, or its files are protected by checksums,
            as in a run's ``last/``.
    """
    if not (folder / CONFIG).is_file() or checkpoint is not None:
        raise AdderkitError(
            f"--record writes into a saved folder, but {folder} with these weights is not one; leave out --record"
        )
    if (folder / "state").exists():
        raise AdderkitError(
            f"{folder} is a checkpoint that a run resumes from and is protected by checksums, so nothing can be "
            "recorded in it; evaluate best/ next to it, or a copy without state/ and checksums.json"
        )


def evaluations_of(report: Report, digest: str) -> list[Evaluation]:
    """Return the measurements on a model's weights: the recorded evaluations, or else those of the training run.

    Args:
        report: Report of the model.
        digest: SHA-256 of its weights.
    """
    recorded = entries_of(report, digest)
    if not recorded:
        dataset = part_of(report.training, "recipe").get("dataset")
        recorded = [{**part_of(report.metrics, split), "dataset": dataset, "split": split} for split in report.metrics]
    return [found for each in recorded if (found := _evaluation(each)) is not None]


def _evaluation(entry: Mapping[str, Any]) -> Evaluation | None:
    """Read an entry as it was recorded; ``None`` for one that somebody else has changed to another form."""
    dataset, split, images, command = (entry.get(key) for key in ("dataset", "split", "images", "command"))
    top1, top5 = _percentage(entry.get("top1")), _percentage(entry.get("top5"))
    if not isinstance(dataset, str) or not isinstance(split, str) or not (dataset and (dataset + split).isprintable()):
        return None
    if type(images) is not int or not 0 <= images < _MOST_IMAGES or top1 is None or top5 is None:
        return None
    return Evaluation(dataset, split, images, top1, top5, command if isinstance(command, str) else None)


def _percentage(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and 0 <= value <= 100 else None


def entries_of(report: Report, digest: str) -> list[Mapping[str, Any]]:
    """Return the recorded evaluations of the weights with a SHA-256, as ``record_evaluation`` wrote them."""
    return [each for each in report.evaluations if each.get("sha256") == digest]


def hub_dataset(name: str) -> str | None:
    """Return the name of a data set on the Hub; ``None`` for one that is not there."""
    if match := re.fullmatch(r"hfds/([\w.-]+(?:/[\w.-]+)?)", name, re.ASCII):
        return match[1]
    return _ON_THE_HUB.get(name)


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """Return a measurement as entries of a model card's ``model-index``, with the accuracy as a fraction."""
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
