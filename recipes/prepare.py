"""Everything that a training step needs, built and checked against each other before the first step."""

import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.utils.data import DataLoader

from ..convert.errors import DatasetError, RecipeError
from ..convert.rewrite import adder_layers, is_converted
from .adaptive_rate import AdaptiveRate
from .data import DataConfig, ImageSource, class_names, evaluation_transform, make_loader, training_transform
from .objective import Objective
from .recipe import Recipe
from .setup import Job, build_teacher, check_norms, open_split


@dataclasses.dataclass
class Run:
    """Everything that a step needs, prepared by the accelerator."""

    recipe: Recipe
    accelerator: Accelerator
    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    norm_images: ImageSource | None

    @property
    def bare_model(self) -> nn.Module:
        """The model without accelerate's wrapper."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in an epoch; a last window of fewer batches counts."""
        return math.ceil(len(self.train_loader) / self.recipe.grad_accum_steps)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Seed everything and set accelerate up as the recipe says."""
    set_seed(recipe.seed)
    return Accelerator(
        mixed_precision=recipe.amp,
        gradient_accumulation_steps=recipe.grad_accum_steps,
        step_scheduler_with_optimizer=False,
        project_config=ProjectConfiguration(automatic_checkpoint_naming=False),
    )


def prepare(job: Job, recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> Run:
    """Build teacher, data, optimizer and schedule for a model, check that they fit, and hand them to accelerate.

    Raises:
        AdderkitError: Something is missing, unknown or does not fit.
    """
    check_norms(model)
    teacher = build_teacher(job, recipe, model)
    data = DataConfig.of(model)
    train_set, eval_set = (open_split(recipe, model, training=training) for training in (True, False))
    _check_classes(train_set, eval_set)
    optimizer = _optimizer(recipe, model)
    for layer in adder_layers(model).values():
        layer.sharpness = recipe.sharpness
    if recipe.eta and is_converted(model):
        AdaptiveRate(optimizer, model, recipe.eta)
    train_loader = make_loader(
        train_set,
        training_transform(data, recipe.augmentation),
        recipe.batch_size,
        recipe.workers,
        training=True,
        seed=recipe.seed,
    )
    eval_loader = make_loader(eval_set, evaluation_transform(data), recipe.batch_size, recipe.workers, training=False)
    # A data set of its own: its transform is not the training one.
    norm_images = open_split(recipe, model, training=True) if recipe.bn_images and is_converted(model) else None
    model, optimizer, train_loader, eval_loader = accelerator.prepare(model, optimizer, train_loader, eval_loader)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        model=model,
        objective=Objective(recipe, teacher).to(accelerator.device),
        optimizer=optimizer,
        schedule=None,
        train_loader=train_loader,
        eval_loader=eval_loader,
        norm_images=norm_images,
    )
    return dataclasses.replace(run, schedule=_schedule(recipe, optimizer, run.updates_per_epoch))


def _check_classes(train_set: ImageSource, eval_set: ImageSource) -> None:
    """Class folders are numbered split by split: other names mean other labels."""
    names, others = class_names(train_set), class_names(eval_set)
    if names is not None and others is not None and names != others:
        differing = sorted(set(names) ^ set(others))[:4]
        raise DatasetError(f"the training and evaluation splits differ in their classes: {', '.join(differing)}")


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise RecipeError(f"opt is {recipe.opt!r}, expected an optimizer that timm can build: {error}") from error
    return optimizer


def _schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
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
