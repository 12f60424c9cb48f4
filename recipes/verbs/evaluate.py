"""The ``evaluate`` verb's work: a model by name, a split by name, metrics."""

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, evaluation_transform, make_loader
from ..reporting.evaluations import check_recordable, record_evaluation
from ..training.evaluate import Metrics, evaluate
from ..training.models import Job, build_student, open_split


def evaluate_model(
    job: Job,
    dataset: str | None,
    data_dir: str | None,
    split: str,
    batch_size: int,
    workers: int,
    *,
    record: bool = False,
) -> Metrics:
    """Evaluate a saved or named model on a split.

    Args:
        job: The model.
        dataset: Name of the data set.
        data_dir: Where its files are.
        split: Of the data set.
        batch_size: Images in a forward pass.
        workers: Loader processes.
        record: Add the measurement to the saved folder's ``adder_report.json``; no other file of it changes.

    Raises:
        AdderkitError: The model or the data set cannot be had, they do not fit, or nothing can be recorded.
    """
    folder = Path(job.model.removeprefix("local-dir:"))
    if record:
        check_recordable(folder, job.checkpoint)
    recipe = Recipe(dataset=dataset or "", data_dir=data_dir, val_split=split, batch_size=batch_size, workers=workers)
    metrics = evaluate_split(build_student(job, recipe), recipe)
    if record:
        record_evaluation(folder, recipe.dataset, split, metrics)
    return metrics


def evaluate_split(model: nn.Module, recipe: Recipe) -> Metrics:
    """Evaluate a model on the recipe's evaluation split.

    Raises:
        DatasetError: The data set cannot be had, or has other classes than the model.
    """
    accelerator = Accelerator()
    images = open_split(recipe, model, training=False)
    transform = evaluation_transform(DataConfig.of(model))
    loader = make_loader(images, transform, recipe.batch_size, recipe.workers, training=False)
    model, loader = accelerator.prepare(model, loader)
    return evaluate(model, loader, accelerator)
