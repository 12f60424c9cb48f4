"""The ``evaluate`` verb's work: a model by name, a split by name, metrics."""

from accelerate import Accelerator

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
    recipe = Recipe(dataset=dataset or "", data_dir=data_dir, val_split=split)
    accelerator = Accelerator()
    model = build_student(job, recipe)
    images = open_split(recipe, model, training=False)
    loader = make_loader(images, evaluation_transform(DataConfig.of(model)), batch_size, workers, training=False)
    model, loader = accelerator.prepare(model, loader)
    return evaluate(model, loader, accelerator)
