"""``finetune --dry-run``: the plan of a run, its memory and its time as far as they can be told; nothing is written."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import yaml
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch.utils.data import IterableDataset

from ...convert.errors import DatasetError
from ...convert.model_source import ModelSource
from ...convert.record import require_float_weights
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource, check_name, loader_workers, open_dataset, subset
from ..data.mixing import Mixing
from ..runs.plan import RunPlan, batches_per_epoch, check_batches
from ..runs.trackers import tracker_names
from .assemble import check_backend, check_classes, configure_layers, make_objective, make_optimizer, make_schedule
from .memory import Memory, estimate_memory
from .models import Job, build_student, check_class_count, check_norms, draw_adder_weights, teacher_of

# Images for training and evaluation, and classes, of the one data set whose size everybody knows.
_IMAGENET = (1_281_167, 50_000, 1000)
_IMAGENET_NAMES = ("imagenet", "imagenet-1k", "imagenet1k", "ilsvrc2012")
_DOWNLOADING = ("hfds/", "hfids/", "tfds/")  # readers that would fetch the data set to open it

Splits = tuple[ImageSource, ImageSource]


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a run would be.

    Args:
        plan: Model, data, steps, rate.
        memory: Of each process.
        data: Why the number of images is unknown, or whence it is known without the data set; else ``None``.
        rate: Training images per second that the last training of this model had, and where; ``None`` without one.
    """

    plan: RunPlan
    memory: Memory
    data: str | None
    rate: tuple[float, str] | None

    @property
    def hours(self) -> float | None:
        """Of training alone, at the measured rate."""
        if self.rate is None or self.plan.images_in_all is None:
            return None
        return self.plan.images_in_all / self.rate[0] / 3600

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        images_per_second, where = self.rate or (None, None)
        return {
            "plan": self.plan.to_dict(),
            "memory": self.memory.to_dict(),
            "data": self.data,
            "images_per_second": images_per_second,
            "measured_on": where,
            "hours": self.hours,
            "recipe": self.plan.recipe.to_dict(),
        }

    def text(self) -> str:
        """The same for people; the recipe as YAML."""
        lines = self.plan.lines()
        if self.data:
            lines["data"] = self.data
        lines["memory"] = self.memory.line(self.plan.recipe.batch_size)
        lines["time"] = self._time()
        width = max(map(len, lines))
        settings = yaml.safe_dump(self.plan.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        return "\n".join(f"{title:<{width}}  {text}" for title, text in lines.items()) + f"\n\n{settings}"

    def _time(self) -> str:
        images = self.plan.images_in_all
        if images is None:
            return "unknown, as the number of images is"
        if self.rate is None or self.hours is None:
            return (
                f"hours = {images:,} images / (images per second) / 3600, besides evaluation; "
                "not measured: train a few minutes, and its progress shows the images per second"
            )
        return f"{self.hours:.1f} hours of training at {self.rate[0]:.0f} images/s, measured on {self.rate[1]}"


def dry_run(job: Job, recipe: Recipe, processes: int) -> DryRun:
    """Work out what ``finetune.start`` would do; neither weights nor images are read, except those of saved folders.

    Args:
        job: The model, its teacher and its weights.
        recipe: All settings.
        processes: How many there would be.

    Raises:
        AdderkitError: Something does not fit or is unknown; that the data set is not here is no error.
    """
    tracker_names(recipe.log_with)
    check_name(recipe.dataset, recipe.data_dir)
    splits, note, classes = _open_splits(recipe)
    if splits is None and job.source.folder is None and job.source.num_classes is None:
        num_classes = classes or _default_classes(job.source.name)
        job = dataclasses.replace(job, source=dataclasses.replace(job.source, num_classes=num_classes))
    model = build_student(job, recipe, weights=False)
    require_float_weights(model, "trained", "train the network that it was made from, with --recipe int8-qat")
    if recipe.adder_init == "normal":
        draw_adder_weights(model)
    check_norms(model)
    check_backend(recipe)
    objective = make_objective(job, recipe, model, weights=False)
    if splits is not None:
        for dataset in splits:
            check_class_count(dataset, recipe, model)
        check_classes(*splits)
        Mixing(recipe, model, splits[0])
    optimizer = make_optimizer(recipe, model, processes)
    images, evaluation_images = _counts(recipe, splits, known=classes is not None)
    steps = _steps_per_epoch(recipe, images, processes, splits)
    make_schedule(recipe, optimizer, steps or 1)
    plan = RunPlan.of(
        model,
        model=job.source.name,
        teacher=teacher_of(job) if objective.teacher is not None else None,
        recipe=recipe,
        processes=processes,
        images=images,
        evaluation_images=evaluation_images,
        steps_per_epoch=steps,
    )
    memory = estimate_memory(model, objective, recipe, DataConfig.of(model).input_size, processes)
    configure_layers(model, objective, recipe, processes)  # at the end: with synchronized BatchNorms it cannot run here
    return DryRun(plan, memory, note, _measured_rate(job.source))


def _open_splits(recipe: Recipe) -> tuple[Splits | None, str | None, int | None]:
    """Both splits; or why there are none, and the number of classes where the data set is ImageNet by its name."""
    if recipe.dataset.startswith(_DOWNLOADING):
        reason = f"a dry run does not fetch {recipe.dataset}"
    else:
        try:
            training, evaluation = (
                open_dataset(recipe.dataset, recipe.data_dir, split) for split in (recipe.train_split, recipe.val_split)
            )
        except DatasetError as error:
            reason = str(error)
        else:
            return (subset(training, recipe.train_images, recipe.seed), evaluation), None, None
    name = recipe.data_dir if recipe.dataset == "folder" else recipe.dataset
    if Path(name or "").name.lower() in _IMAGENET_NAMES:
        return None, f"the numbers are ImageNet's; data set not found here: {reason}", _IMAGENET[2]
    return None, f"images unknown: data set not found here: {reason}", None


def _counts(recipe: Recipe, splits: Splits | None, *, known: bool) -> tuple[int | None, int | None]:
    """Images for training and evaluation."""
    if splits is not None:
        return len(splits[0]), len(splits[1])
    if known:
        return min(_IMAGENET[0], recipe.train_images or _IMAGENET[0]), _IMAGENET[1]
    return recipe.train_images or None, None


def _steps_per_epoch(recipe: Recipe, images: int | None, processes: int, splits: Splits | None) -> int | None:
    if images is None:
        return None
    streamed = splits is not None and isinstance(splits[0], IterableDataset)
    workers = max(1, loader_workers(recipe.workers)) if streamed else 0
    batches = batches_per_epoch(images, recipe.batch_size, processes, workers)
    check_batches(batches, images, recipe.batch_size, processes)
    return math.ceil(batches / recipe.grad_accum_steps)


def _default_classes(name: str) -> int | None:
    config = get_pretrained_cfg(split_model_name_tag(name)[0])
    return config.num_classes if config else None


def _measured_rate(source: ModelSource) -> tuple[float, str] | None:
    """Images per second of the training that made a saved folder, and on what."""
    training = source.report().get("training")
    if not isinstance(training, dict) or not isinstance(training.get("images_per_second"), int | float):
        return None
    return float(training["images_per_second"]), f"{training.get('processes', 1)} x {training.get('device', 'unknown')}"
