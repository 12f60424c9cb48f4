"""``finetune --dry-run``: the plan of a run, its memory and its time, estimated without writing anything."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from timm.models import get_pretrained_cfg, split_model_name_tag

from ...convert.errors import DatasetError
from ...convert.model_source import ModelSource
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, check_name, open_dataset
from ..distributed.sync_batchnorm import each_process_alone
from ..runs.plan import RunPlan
from ..runs.trackers import tracker_names
from .assemble import Data, assemble, first_model
from .memory import Memory, estimate_memory
from .models import Job, label_split

# Images for training and evaluation, and classes, of the one data set whose size everybody knows.
_IMAGENET = (1_281_167, 50_000, 1000)
_IMAGENET_NAMES = ("imagenet", "imagenet-1k", "imagenet1k", "ilsvrc2012")
_DOWNLOADING = ("hfds/", "hfids/", "tfds/")  # readers that would fetch the data set to open it


@dataclasses.dataclass(frozen=True)
class DryRun:
    """A run as it would be.

    Args:
        plan: Model, data, steps, rate.
        memory: Memory of each process.
        note: Why the number of images is unknown, or how it is known without the data set; else ``None``.
        rate: Training images per second of the last training of this model, and its device; ``None`` without one.
    """

    plan: RunPlan
    memory: Memory
    note: str | None
    rate: tuple[float, str] | None

    @property
    def hours(self) -> float | None:
        """Hours of training alone, at the measured rate."""
        if self.rate is None or self.plan.images_in_all is None:
            return None
        return self.plan.images_in_all / self.rate[0] / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        images_per_second, device = self.rate or (None, None)
        return {
            "plan": self.plan.to_dict(),
            "memory": self.memory.to_dict(),
            "data": self.note,
            "images_per_second": images_per_second,
            "measured_on": device,
            "hours": self.hours,
            "recipe": self.plan.recipe.to_dict(),
        }

    def text(self) -> str:
        """Return the same as text; the recipe as YAML."""
        lines = self.plan.lines()
        if self.note:
            lines["data"] = self.note
        lines["memory"] = self.memory.line(self.plan.recipe.batch_size)
        lines["time"] = self._time()
        width = max(map(len, lines))
        settings = yaml.safe_dump(self.plan.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        return "\n".join(f"{title:<{width}}  {text}" for title, text in lines.items()) + f"\n\n{settings}"

    def _time(self) -> str:
        images = self.plan.images_in_all
        if images is None:
            return "unknown, since the number of images is"
        if self.rate is None or self.hours is None:
            return (
                f"hours = {images:,} images / (images per second) / 3600, besides evaluation; "
                "not measured: train a few minutes, and the progress shows the images per second"
            )
        return f"{self.hours:.1f} hours of training at {self.rate[0]:.0f} images/s, measured on {self.rate[1]}"


def dry_run(job: Job, recipe: Recipe, processes: int) -> DryRun:
    """Assemble a run and stop before its first step; neither weights nor images are read, except from saved folders.

    Args:
        job: The model, its teacher and its weights.
        recipe: All settings.
        processes: The number of processes that there would be.

    Raises:
        AdderkitError: Something does not fit or is unknown; a data set that is not here is not an error.
    """
    tracker_names(recipe.log_with)
    check_name(recipe.dataset, recipe.data_dir)
    data, note, classes = _find_data(recipe)
    if data.splits is None and job.source.folder is None and job.source.num_classes is None:
        num_classes = classes or _default_classes(job.source.name)
        job = dataclasses.replace(job, source=dataclasses.replace(job.source, num_classes=num_classes))
    model = first_model(job, recipe, weights=False)
    if data.splits is not None:
        training, evaluation = data.splits
        data = Data.of(
            label_split(training, recipe, model, training=True), label_split(evaluation, recipe, model, training=False)
        )
    assembly = assemble(job, recipe, model, data, processes=processes, weights=False)
    assembly.make_schedule(assembly.plan.steps_per_epoch or 1)
    with each_process_alone(model), each_process_alone(assembly.objective):
        memory = estimate_memory(model, assembly.objective, recipe, DataConfig.of(model).input_size, processes)
    return DryRun(assembly.plan, memory, note, _measured_rate(job.source))


def _find_data(recipe: Recipe) -> tuple[Data, str | None, int | None]:
    """Open both splits; else return why not, and ImageNet's numbers and classes where it is the data set by name."""
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
            return Data.of(training, evaluation), None, None
    name = recipe.data_dir if recipe.dataset == "folder" else recipe.dataset
    if Path(name or "").name.lower() in _IMAGENET_NAMES:
        images, evaluation_images, classes = _IMAGENET
        data = Data(min(images, recipe.train_images or images), evaluation_images, None)
        return data, f"the numbers are ImageNet's; data set not found here: {reason}", classes
    data = Data(recipe.train_images or None, None, None)
    return data, f"images unknown: data set not found here: {reason}", None


def _default_classes(name: str) -> int | None:
    config = get_pretrained_cfg(split_model_name_tag(name)[0])
    return config.num_classes if config else None


def _measured_rate(source: ModelSource) -> tuple[float, str] | None:
    """Return the images per second of the training that made a saved folder, and its device."""
    training = source.report().training
    if not isinstance(training.get("images_per_second"), int | float):
        return None
    return float(training["images_per_second"]), f"{training.get('processes', 1)} x {training.get('device', 'unknown')}"
