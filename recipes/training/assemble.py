"""Assembly of a run: everything that a step needs, built and checked against each other, up to the first step.

A run and a dry run assemble alike; a run then hands the parts to accelerate (``prepare.py``).
"""

import dataclasses
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import IterableDataset

from ...adder_layers.modules import adder_layers
from ...convert.checkpoint.configuration import check_savable
from ...convert.conversion.targets import converted_layers
from ...convert.errors import RecipeError
from ...convert.record import require_float_weights
from ..configs.recipe import Recipe
from ..data.datasets import ImageSource
from ..data.mixing import Mixing
from ..data.workers import loader_workers
from ..distributed.sync_batchnorm import synchronize_batchnorm_
from ..objectives.objective import Objective
from ..objectives.terms import teacher_need
from ..runs.plan import RunPlan, batches_per_epoch, check_batches
from .adaptive_rate import AdaptiveRate
from .models import (
    Job,
    build_student,
    build_teacher,
    check_norms,
    check_single_images,
    draw_adder_weights,
    open_split,
    teacher_of,
)
from .qat import prepare_qat_


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and evaluation images, or for a dry run only their numbers.

    Args:
        images: Number of training images; ``None`` where it is unknown.
        evaluation_images: Number of evaluation images; likewise.
        splits: The training and the evaluation split; ``None`` where the data set is not here.
    """

    images: int | None
    evaluation_images: int | None
    splits: tuple[ImageSource, ImageSource] | None

    @classmethod
    def of(cls, training: ImageSource, evaluation: ImageSource) -> "Data":
        """Describe splits that are here."""
        return cls(_count(training), _count(evaluation), (training, evaluation))

    @property
    def streamed(self) -> bool:
        """Whether images come as a stream, without random access."""
        return self.splits is not None and isinstance(self.splits[0], IterableDataset)


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A run before its first step, without anything of accelerate.

    Args:
        recipe: All settings.
        model: The model to train, its layers set up.
        objective: The losses, with the teacher.
        optimizer: It steps on all that trains, the adaptive rate attached.
        mixing: Mixup and cutmix; ``None`` where there are no images.
        data: The images.
        plan: The run in figures.
    """

    recipe: Recipe
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    mixing: Mixing | None
    data: Data
    plan: RunPlan

    def make_schedule(self, updates_per_epoch: int) -> Scheduler:
        """Build timm's learning rate schedule, by optimizer steps.

        Raises:
            RecipeError: timm cannot build it.
        """
        recipe = self.recipe
        try:
            schedule, _ = create_scheduler_v2(
                self.optimizer,
                sched=recipe.sched,
                num_epochs=recipe.epochs,
                warmup_epochs=recipe.warmup_epochs,
                warmup_lr=recipe.warmup_lr,
                min_lr=recipe.min_lr,
                step_on_epochs=False,
                updates_per_epoch=updates_per_epoch,
            )
        except (ValueError, AssertionError) as error:
            raise RecipeError(f"sched is {recipe.sched!r}, expected a schedule that timm can build: {error}") from error
        if schedule is None:
            raise RecipeError(f"sched is {recipe.sched!r}, expected one of timm's schedules such as cosine or step")
        return schedule


def first_model(job: Job, recipe: Recipe, *, weights: bool = True) -> nn.Module:
    """Build the model that a run begins with.

    Args:
        job: What was named.
        recipe: Data set, image size, initialization, quantization.
        weights: Whether weights and images are read; a dry run needs neither.

    Raises:
        AdderkitError: The model cannot be built, or not be trained.
    """
    model = build_student(job, recipe, weights=weights)
    if weights:
        check_savable(model)
    require_float_weights(model, "trained", "train the network that it was made from, with --recipe int8-qat")
    if recipe.adder_init == "normal":
        draw_adder_weights(model)
    if recipe.bits and weights:
        prepare_qat_(model, recipe)
    return model


def open_data(recipe: Recipe, model: nn.Module) -> Data:
    """Open the training and the evaluation split for a model.

    Raises:
        DatasetError: The data set is missing, or has other classes than the model.
    """
    return Data.of(open_split(recipe, model, training=True), open_split(recipe, model, training=False))


def assemble(
    job: Job, recipe: Recipe, model: nn.Module, data: Data, *, processes: int, weights: bool = True
) -> Assembly:
    """Build teacher, objective and optimizer for a model, and check that everything fits together.

    Args:
        job: What was named.
        recipe: All settings.
        model: The model to train; its layers are set up in place.
        data: The images, or their numbers.
        processes: Number of processes.
        weights: Whether the teacher's weights are wanted; a dry run does without.

    Raises:
        AdderkitError: Something is missing, unknown or does not fit.
    """
    check_norms(model)
    check_single_images(model, recipe, data.images, processes)
    _check_compiler(recipe)
    objective = _make_objective(job, recipe, model, weights=weights)
    mixing = None
    if data.splits is not None:
        mixing = Mixing(recipe, model, data.splits[0])
    configure_layers(model, objective, recipe, processes)
    if recipe.grad_checkpointing:
        _checkpoint_gradients(model)
    optimizer = _make_optimizer(recipe, model, objective, processes)
    plan = RunPlan.of(
        model,
        model=job.source.name,
        teacher=teacher_of(job) if objective.teacher is not None else None,
        recipe=recipe,
        processes=processes,
        images=data.images,
        evaluation_images=data.evaluation_images,
        steps_per_epoch=_steps_per_epoch(recipe, data, processes),
    )
    return Assembly(recipe, model, objective, optimizer, mixing, data, plan)


def _make_objective(job: Job, recipe: Recipe, student: nn.Module, *, weights: bool) -> Objective:
    need, teacher = teacher_need(recipe), None
    if need is not None:
        teacher = build_teacher(job, recipe, student, trains=need == "training", weights=weights)
    return Objective(recipe, teacher, student)


def configure_layers(model: nn.Module, objective: Objective, recipe: Recipe, processes: int) -> None:
    """Set the gradient's sharpness of adder layers, and synchronize BatchNorms, as the recipe says.

    Raises:
        RecipeError: A BatchNorm cannot be synchronized.
    """
    for layer in adder_layers(model).values():
        layer.sharpness = recipe.sharpness
    if recipe.sync_bn and processes > 1:
        synchronize_batchnorm_(model)
        if objective.trains_teacher:  # a frozen one computes as in evaluation
            synchronize_batchnorm_(objective)


def _checkpoint_gradients(model: nn.Module) -> None:
    timm_model: Any = model
    try:
        timm_model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise RecipeError(
            f"grad_checkpointing is on, and {type(model).__name__} cannot do it ({error}); "
            "turn it off with --set grad_checkpointing=false"
        ) from error


def _make_optimizer(recipe: Recipe, model: nn.Module, objective: Objective, processes: int) -> torch.optim.Optimizer:
    """Build timm's optimizer for all that trains, with rates scaled to the images of a step, and the adaptive rate.

    What the objective holds (a teacher that trains, the learned layers of its terms) joins the student's optimizer,
    since a step that is skipped is then skipped for both. Its rate is ``teacher_lr``, or ``lr`` where that is 0.

    Raises:
        RecipeError: timm cannot build the optimizer.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.scaled_lr(processes),
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise RecipeError(f"opt is {recipe.opt!r}, expected an optimizer that timm can build: {error}") from error
    if objective.trains:
        rate = recipe.scaled(recipe.teacher_lr or recipe.lr, processes)
        for group in param_groups_weight_decay(objective, recipe.weight_decay):
            optimizer.add_param_group({**group, "lr": rate})
    if recipe.eta and converted_layers(model, "adaptive_rate"):
        AdaptiveRate(optimizer, model, recipe.eta)
    return optimizer


def _steps_per_epoch(recipe: Recipe, data: Data, processes: int) -> int | None:
    """Optimizer steps of an epoch; ``None`` where the number of images is unknown."""
    if data.images is None:
        return None
    workers = max(1, loader_workers(recipe.workers)) if data.streamed else 0
    batches = batches_per_epoch(data.images, recipe.batch_size, processes, workers)
    check_batches(batches, data.images, recipe.batch_size, processes)
    return math.ceil(batches / recipe.grad_accum_steps)


def _count(split: ImageSource) -> int:
    """Images of a split; a stream's own length is what one process reads of it."""
    reader = getattr(split, "reader", None)
    return int(reader.num_samples) if isinstance(split, IterableDataset) and reader is not None else len(split)


def _check_compiler(recipe: Recipe) -> None:
    if recipe.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if recipe.torchcompile not in known:
            raise RecipeError(f"torchcompile is {recipe.torchcompile!r}, expected one of {', '.join(known)}")
