"""The ``evaluate`` verb's work: a model by name, a split by name, metrics."""

from accelerate import Accelerator
from torch import nn

from .data import DataConfig, evaluation_transform, make_loader
from .evaluate import Metrics, evaluate
from .recipe import Recipe
from .setup import Job, build_student, open_split


def evaluate_model(
    job: Job, dataset: str | None, data_dir: str | None, split: str, batch_size: int, workers: int
) -> Metrics:
    """Evaluate a saved or named model on a split.

    Raises:
        AdderkitError: The model or the data set cannot be had, or they do not fit.
    """
    recipe = Recipe(dataset=dataset or "", data_dir=data_dir, val_split=split, batch_size=batch_size, workers=workers)
    return evaluate_split(build_student(job, recipe), recipe)


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
