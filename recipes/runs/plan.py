"""The plan of a run in figures: model, data, optimizer steps, images per step, learning rate."""

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from ...convert.conversion.targets import converted_layers
from ...convert.errors import DatasetError
from ..configs.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A run before its first step.

    Args:
        model: Name of the model, as on the command line.
        teacher: Name of the teacher, if there is one.
        parameters: Number of weights.
        converted_layers: Number of layers that a conversion made.
        convolutions: Number of other convolutions.
        recipe: All settings.
        processes: Number of processes.
        images: Images of the training split; ``None`` where they are unknown.
        evaluation_images: Images of the evaluation split; ``None`` where they are unknown.
        steps_per_epoch: Optimizer steps per epoch; ``None`` where the images are unknown.
    """

    model: str
    teacher: str | None
    parameters: int
    converted_layers: int
    convolutions: int
    recipe: Recipe
    processes: int
    images: int | None
    evaluation_images: int | None
    steps_per_epoch: int | None

    @classmethod
    def of(cls, network: nn.Module, **known: Any) -> "RunPlan":
        """Make a plan, counting the layers and weights of a network."""
        converted = len(converted_layers(network))
        convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules()) - converted
        parameters = sum(parameter.numel() for parameter in network.parameters())
        return cls(parameters=parameters, converted_layers=converted, convolutions=convolutions, **known)

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step."""
        return self.recipe.batch_size * self.processes * self.recipe.grad_accum_steps

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        return None if self.steps_per_epoch is None else self.steps_per_epoch * self.recipe.epochs

    @property
    def images_in_all(self) -> int | None:
        """Training images of the whole run, each counted once per epoch."""
        return None if self.images is None else self.images * self.recipe.epochs

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping, without the recipe."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "recipe"}
        return {
            **fields,
            "epochs": self.recipe.epochs,
            "steps": self.steps,
            "effective_batch": self.effective_batch,
            "lr": self.recipe.scaled_lr(self.processes),
            "images_in_all": self.images_in_all,
        }

    def lines(self) -> dict[str, str]:
        """Return the plan as text, by title."""
        recipe = self.recipe
        steps = "unknown, since the number of images is"
        if self.steps_per_epoch is not None:
            steps = f"{self.steps_per_epoch:,} per epoch, {self.steps:,} in {recipe.epochs} epochs"
        accumulated = f" x {recipe.grad_accum_steps} batches" if recipe.grad_accum_steps > 1 else ""
        processes = f" x {self.processes} processes" if self.processes > 1 else ""
        product = f"{recipe.batch_size}{processes}{accumulated}"
        rate, given = recipe.scaled_lr(self.processes), f"{recipe.lr:g}"
        scaled = f" = {given} x {self.effective_batch} / {recipe.lr_base_size}" if recipe.lr_base_size else ""
        return {
            "model": f"{self.model}: {self.parameters:,} parameters, {self.converted_layers} converted layers, "
            f"{self.convolutions} convolutions",
            "teacher": self.teacher or "none",
            "training": f"{_count(self.images)} images ({recipe.dataset}, {recipe.train_split})",
            "evaluation": f"{_count(self.evaluation_images)} images ({recipe.dataset}, {recipe.val_split})",
            "step": f"{product} = {self.effective_batch} images" if processes or accumulated else f"{product} images",
            "steps": steps,
            "learning rate": f"{rate:g}{scaled} ({recipe.opt}, {recipe.sched})",
        }


def batches_per_epoch(images: int, batch_size: int, processes: int, streaming_workers: int = 0) -> int:
    """Return the batches per epoch of each process.

    Args:
        images: Images of the training split.
        batch_size: Batch size of one process.
        processes: Number of processes, which share the batches.
        streaming_workers: Loader processes of a streamed data set, each of which fills its last batch up; 0 for one
            that is not streamed, whose last batches are dropped where there is not one for each process.
    """
    if streaming_workers:
        each = math.ceil(images / (processes * streaming_workers))
        return math.ceil(each / batch_size) * streaming_workers
    if processes == 1:
        return max(1, images // batch_size)
    return images // batch_size // processes  # accelerate would repeat images to give each process a batch


def check_batches(batches: int, images: int, batch_size: int, processes: int) -> None:
    """Refuse a training split that has too few batches for the processes.

    Raises:
        DatasetError: There is not one for each process.
    """
    if batches == 0:
        raise DatasetError(
            f"there are {images} training images, expected at least {batch_size * processes}, {batch_size} for each of "
            f"{processes} processes; set a lower batch_size, or fewer processes"
        )


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _count(images: int | None) -> str:
    return "unknown number of" if images is None else f"{images:,}"
