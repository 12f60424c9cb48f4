"""Everything that a training step needs, built and checked against each other before the first step."""

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import ProjectConfiguration, set_seed
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ...adder_layers.modules import adder_layers
from ...convert.conversion.rewrite import is_converted
from ...convert.errors import DatasetError, RecipeError
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource, class_names, evaluation_transform, make_loader, training_transform
from ..data.mixing import Mixing
from ..distributed.sharding import check_sharding
from ..distributed.sync_batchnorm import synchronize_batchnorm_
from ..objectives.objective import Objective
from ..objectives.terms import teacher_need
from ..runs.plan import check_batches
from ..runs.state import RunState
from ..runs.trackers import tracker_names
from .adaptive_rate import AdaptiveRate
from .ema import make_average
from .models import Job, build_teacher, check_norms, open_split


@dataclasses.dataclass
class Run:
    """Everything that a step needs, prepared by the accelerator."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    average: ModelEmaV3 | None
    objective: Objective
    mixing: Mixing
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    norm_images: ImageSource | None
    images_per_second: float | None = None  # in training, of the last epoch, all processes together

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of accelerate and the compiler."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    @property
    def in_training(self) -> list[nn.Module]:
        """What has gradients: the model, and the objective where its teacher trains too."""
        learns = any(parameter.requires_grad for parameter in self.objective.parameters())
        return [self.model, self.objective] if learns else [self.model]

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; a last window of fewer batches counts."""
        return math.ceil(len(self.train_loader) / self.recipe.grad_accum_steps)

    def steps_done(self, position: RunState) -> int:
        """Optimizer steps of the whole run up to a position, skipped ones included."""
        return position.epoch * self.updates_per_epoch + math.ceil(position.batches / self.recipe.grad_accum_steps)


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Seed everything and set accelerate up as the recipe says; trackers that write files do it in the run's folder.

    Raises:
        RecipeError: A tracker is unknown or not installed, the device cannot compute in half precision, or weights are
            to be divided as the loop cannot.
    """
    set_seed(recipe.seed)
    trackers = tracker_names(recipe.log_with) or None
    places = ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers"), automatic_checkpoint_naming=False)
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.amp,
            gradient_accumulation_steps=recipe.grad_accum_steps,
            step_scheduler_with_optimizer=False,
            log_with=trackers,
            project_config=places,
        )
    except ValueError as error:
        raise RecipeError(f"accelerate cannot be set up with amp {recipe.amp!r}: {error}") from error
    check_sharding(recipe, accelerator)
    return accelerator


def prepare(job: Job, recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> Run:
    """Build teacher, data, optimizer and schedule for a model, check that they fit, and hand them to accelerate.

    Raises:
        AdderkitError: Something is missing, unknown or does not fit.
    """
    check_norms(model)
    check_backend(recipe)
    objective = make_objective(job, recipe, model).to(accelerator.device)
    train_set, eval_set = (open_split(recipe, model, training=training) for training in (True, False))
    check_classes(train_set, eval_set)
    mixing = Mixing(recipe, model, train_set)
    # A data set of its own: its transform is not the training one.
    norm_images = open_split(recipe, model, training=True) if recipe.bn_images and is_converted(model) else None
    configure_layers(model, objective, recipe, accelerator.num_processes)
    if recipe.channels_last:
        for each in (model, objective):
            each.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(recipe, model, accelerator.num_processes)
    if recipe.eta and is_converted(model):
        AdaptiveRate(optimizer, model, recipe.eta)
    train_loader, eval_loader = _loaders(recipe, DataConfig.of(model), train_set, eval_set)
    model, optimizer, eval_loader = accelerator.prepare(model, optimizer, eval_loader)
    train_loader = shard_loader(accelerator, train_loader)
    check_batches(len(train_loader), len(train_set), recipe.batch_size, accelerator.num_processes)
    if objective.trains:
        add_objective_groups(recipe, objective, optimizer, accelerator.num_processes)
        objective = accelerator.prepare(objective)
    average = make_average(recipe, accelerator, accelerator.unwrap_model(model))
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        model=_compiled(model, recipe),
        average=average,
        objective=objective,
        mixing=mixing,
        optimizer=optimizer,
        schedule=None,
        train_loader=train_loader,
        eval_loader=eval_loader,
        norm_images=norm_images,
    )
    return dataclasses.replace(run, schedule=make_schedule(recipe, optimizer, run.updates_per_epoch))


def make_objective(job: Job, recipe: Recipe, student: nn.Module, *, weights: bool = True) -> Objective:
    """Build the terms that a recipe turns on, and the teacher that they need.

    Raises:
        RecipeError: Settings exclude each other.
        ModelSourceError: No teacher is named, or it does not fit the student.
    """
    need, teacher = teacher_need(recipe), None
    if need is not None:
        teacher = build_teacher(job, recipe, student, trains=need == "training", weights=weights)
    return Objective(recipe, teacher, student)


def add_objective_groups(
    recipe: Recipe, objective: Objective, optimizer: torch.optim.Optimizer, processes: int
) -> None:
    """Let what the objective holds train too: the teacher, and the learned layers of its terms.

    They join the student's optimizer, since a step that is skipped is then skipped for both, with the learning rate
    ``teacher_lr``, or the student's where the teacher is frozen.
    """
    rate = recipe.scaled(recipe.teacher_lr or recipe.lr, processes)
    for group in param_groups_weight_decay(objective, recipe.weight_decay):
        optimizer.add_param_group({**group, "lr": rate})


def configure_layers(model: nn.Module, objective: Objective, recipe: Recipe, processes: int) -> None:
    """What the recipe says of the layers' training.

    Raises:
        RecipeError: See ``synchronize_batchnorm_``.
    """
    for layer in adder_layers(model).values():
        layer.sharpness = recipe.sharpness
    if recipe.sync_bn and processes > 1:
        synchronize_batchnorm_(model)
        if objective.trains_teacher:  # a frozen one computes as in evaluation
            synchronize_batchnorm_(objective)


def _loaders(
    recipe: Recipe, data: DataConfig, train_set: ImageSource, eval_set: ImageSource
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    transform = training_transform(data, recipe.augmentation)
    size, workers = recipe.batch_size, recipe.workers
    return (
        make_loader(train_set, transform, size, workers, training=True, seed=recipe.seed),
        make_loader(eval_set, evaluation_transform(data), size, workers, training=False),
    )


def shard_loader(accelerator: Accelerator, loader: DataLoader[Any]) -> DataLoader[Any]:
    """The training batches of this process; a streamed data set's reader has dealt its shards out already."""
    own: DataLoader[Any]
    if isinstance(loader.dataset, IterableDataset):
        own = prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
    else:
        own = accelerator.prepare(loader)
    return own


def _compiled(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Accelerate does not learn of it, so that saved names are those of the model alone."""
    compiled: Any = torch.compile(model, backend=recipe.torchcompile) if recipe.torchcompile else model
    return cast(nn.Module, compiled)


def check_backend(recipe: Recipe) -> None:
    """Refuse a compiler that torch does not know.

    Raises:
        RecipeError: It does not.
    """
    if recipe.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if recipe.torchcompile not in known:
            raise RecipeError(f"torchcompile is {recipe.torchcompile!r}, expected one of {', '.join(known)}")


def check_classes(train_set: ImageSource, eval_set: ImageSource) -> None:
    """Class folders are numbered split by split: other names mean other labels.

    Raises:
        DatasetError: The splits differ in their classes.
    """
    names, others = class_names(train_set), class_names(eval_set)
    if names is not None and others is not None and names != others:
        differing = sorted(set(names) ^ set(others))[:4]
        raise DatasetError(f"the training and evaluation splits differ in their classes: {', '.join(differing)}")


def make_optimizer(recipe: Recipe, model: nn.Module, processes: int) -> torch.optim.Optimizer:
    """An optimizer of timm's, its rate scaled to the images of a step.

    Raises:
        RecipeError: timm cannot build it.
    """
    rate = recipe.scaled_lr(processes)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=recipe.opt, lr=rate, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise RecipeError(f"opt is {recipe.opt!r}, expected an optimizer that timm can build: {error}") from error
    return optimizer


def make_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """A schedule of timm's for the learning rate, by optimizer steps.

    Raises:
        RecipeError: timm cannot build it.
    """
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
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
