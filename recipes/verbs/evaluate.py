"""``adderkit evaluate``: measure the accuracy of a model on a split of a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..configs.recipe import Recipe
from ..terminal.options import (
    BatchSize,
    Checkpoint,
    ClassMap,
    DataDir,
    Dataset,
    Device,
    InChans,
    Json,
    NumClasses,
    Pretrained,
    Workers,
)
from ..terminal.output import announce, print_json

if TYPE_CHECKING:
    from torch import nn

    from ...convert.model_source import ModelSource
    from ..training.evaluate import Metrics


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Saved folder or timm model name.")],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", "--val-split", metavar="NAME", help="Split to evaluate on.", show_default=Recipe.val_split
        ),
    ] = None,
    class_map: ClassMap = None,
    batch_size: BatchSize = Recipe.batch_size,
    workers: Workers = Recipe.workers,
    device: Device = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    record: Annotated[bool, typer.Option("--record", help="Add the result to the saved folder's report.")] = False,
    json: Json = False,
) -> None:
    """Evaluate a model on a split of a data set.

    Prints top-1 and top-5 accuracy, loss and images per second.
    """
    from accelerate import PartialState

    from ...convert.model_source import ModelSource
    from ..runs.provenance import DataChoice, default_data
    from ..terminal.tables import metrics_table, show

    source = ModelSource(model, pretrained, checkpoint, num_classes, in_chans)
    data = default_data(source, DataChoice(dataset, data_dir, val_split=split, class_map=class_map), announce)
    split = data.val_split or Recipe.val_split
    metrics = evaluate_model(
        source,
        data.dataset,
        data.data_dir,
        split,
        batch_size,
        workers,
        class_map=data.class_map,
        record=record,
        device=device,
    )
    if not PartialState().is_main_process:
        return
    if json:
        print_json({"model": model, "dataset": data.dataset, "split": split, **metrics.to_dict()})
    else:
        show(metrics_table([(model, metrics)]))


def evaluate_model(
    source: "ModelSource",
    dataset: str | None,
    data_dir: str | None,
    split: str,
    batch_size: int,
    workers: int,
    *,
    class_map: str | None = None,
    record: bool = False,
    device: str | None = None,
) -> "Metrics":
    """Evaluate a saved or named model on a split.

    Args:
        source: Model to evaluate.
        dataset: Name of the data set.
        data_dir: Folder with its files.
        split: Name of the split.
        batch_size: Images per forward pass.
        workers: Number of data loader processes.
        class_map: File with the class index of each class name.
        record: Add the measurement to the saved folder's ``adder_report.json``; its other files stay as they are.
        device: Device to compute on; by default the GPU, if there is one.

    Raises:
        AdderkitError: The model or the data set cannot be loaded, they do not fit, or nothing can be recorded.
    """
    from accelerate import PartialState

    from ..distributed.device import compute_device
    from ..reporting.evaluations import check_recordable, record_evaluation
    from ..training import models

    folder = source.folder or Path(source.name)
    if record:
        check_recordable(folder, source.checkpoint)
    recipe = Recipe(
        dataset=dataset or "",
        data_dir=data_dir,
        val_split=split,
        class_map=class_map or "",
        batch_size=batch_size,
        workers=workers,
    )
    with compute_device(device):
        metrics = evaluate_split(models.build_student(models.Job(source), recipe, training=False), recipe)
    if record and PartialState().is_main_process:
        record_evaluation(folder, recipe.dataset, split, metrics)
    return metrics


def evaluate_split(model: "nn.Module", recipe: Recipe) -> "Metrics":
    """Evaluate a model on the recipe's evaluation split.

    Raises:
        DatasetError: The data set cannot be opened, or its classes are not the model's.
    """
    from accelerate import Accelerator

    from ..data.datasets import DataConfig
    from ..data.loaders import evaluation_transform, make_loader
    from ..training.evaluate import evaluate
    from ..training.models import open_split

    accelerator = Accelerator()
    images = open_split(recipe, model, training=False)
    transform = evaluation_transform(DataConfig.of(model))
    loader = make_loader(images, transform, recipe.batch_size, recipe.workers, training=False)
    model, loader = accelerator.prepare(model, loader)
    return evaluate(model, loader, accelerator)
