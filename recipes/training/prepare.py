"""The parts of a run handed to accelerate: device, processes, precision, loaders."""

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import ProjectConfiguration, set_seed
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ...convert.conversion.targets import is_converted
from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource
from ..data.loaders import evaluation_transform, make_loader, training_transform
from ..data.mixing import Mixing
from ..distributed.process_statistics import keep_process_statistics
from ..distributed.sharding import check_sharding, refuse_second_model
from ..distributed.sync_batchnorm import check_sync_batchnorm
from ..runs.plan import RunPlan
from ..runs.state import RunState
from ..runs.trackers import tracker_names
from .assemble import Assembly
from .ema import make_average
from .models import open_split


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a step needs, prepared by accelerate.

    Args:
        recipe: All settings.
        plan: The run in figures.
        accelerator: It has prepared what follows.
        model: The model in training, perhaps wrapped and compiled.
        average: The moving average of its weights, if there is one.
        objective: The losses: ``Objective``, perhaps wrapped.
        in_training: What has gradients: the model, and the objective where parts of it train.
        loss_names: Values of the objective that are logged, ``"loss"`` first.
        mixing: Mixup and cutmix.
        optimizer: It steps on all that trains.
        schedule: The learning rate, by optimizer steps.
        train_loader: Training batches of this process.
        eval_loader: Evaluation batches of this process.
        norm_images: Images to re-estimate BatchNorm statistics on; ``None`` where they stay as they are.
        updates_per_epoch: Optimizer steps in an epoch; a last window of fewer batches counts.
    """

    recipe: Recipe
    plan: RunPlan
    accelerator: Accelerator
    model: nn.Module
    average: ModelEmaV3 | None
    objective: nn.Module
    in_training: tuple[nn.Module, ...]
    loss_names: tuple[str, ...]
    mixing: Mixing
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    norm_images: ImageSource | None
    updates_per_epoch: int

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrappers of accelerate and the compiler."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model

    def steps_done(self, state: RunState) -> int:
        """Return the optimizer steps of the whole run up to a state, skipped ones included."""
        return state.epoch * self.updates_per_epoch + math.ceil(state.batches_done / self.recipe.grad_accum_steps)


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Seed everything and set accelerate up as the recipe says; trackers that write files do it in the run's folder.

    Raises:
        RecipeError: A tracker is unknown or not installed, the device cannot compute in half precision, or weights are
            to be sharded by other means than FSDP2.
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
    check_sharding(accelerator)
    check_sync_batchnorm(recipe, accelerator)
    return accelerator


def prepare(assembly: Assembly, accelerator: Accelerator) -> Run:
    """Hand the parts of a run to accelerate, and make the loaders and the schedule.

    Args:
        assembly: The parts, with images.
        accelerator: Made by ``make_accelerator``.

    Raises:
        RecipeError: Weights are sharded and the recipe trains a second model, or timm knows no such schedule.
    """
    recipe, objective = assembly.recipe, assembly.objective
    assert assembly.data.splits is not None
    assert assembly.mixing is not None
    refuse_second_model(accelerator, recipe, "model_ema", *(term.switch for term in objective.trained_terms))
    data = DataConfig.of(assembly.model)
    norm_images = None
    if recipe.bn_images and is_converted(assembly.model):
        # A streamed data set's reader holds the epoch and this process's shards, so a second pass needs its own.
        train_set = assembly.data.splits[0]
        streamed = isinstance(train_set, IterableDataset)
        norm_images = open_split(recipe, assembly.model, training=True) if streamed else train_set
    objective.to(accelerator.device)
    if recipe.channels_last:
        for each in (assembly.model, objective):
            each.to(memory_format=torch.channels_last)
    train_loader, eval_loader = _loaders(recipe, data, *assembly.data.splits)
    learning = [objective] if objective.trains else []
    model, optimizer, eval_loader, *learning = accelerator.prepare(
        assembly.model, assembly.optimizer, eval_loader, *learning
    )
    train_loader = _shard_loader(accelerator, train_loader)
    updates_per_epoch = math.ceil(len(train_loader) / recipe.grad_accum_steps)
    average = make_average(recipe, accelerator, accelerator.unwrap_model(model))
    keep_process_statistics(accelerator, accelerator.unwrap_model(model))
    model = _compiled(model, recipe)
    return Run(
        recipe=recipe,
        plan=assembly.plan,
        accelerator=accelerator,
        model=model,
        average=average,
        objective=learning[0] if learning else objective,
        in_training=(model, *learning),
        loss_names=objective.logged,
        mixing=assembly.mixing,
        optimizer=optimizer,
        schedule=assembly.make_schedule(updates_per_epoch),
        train_loader=train_loader,
        eval_loader=eval_loader,
        norm_images=norm_images,
        updates_per_epoch=updates_per_epoch,
    )


def _loaders(
    recipe: Recipe, data: DataConfig, train_set: ImageSource, eval_set: ImageSource
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    transform = training_transform(data, recipe.augmentation)
    size, workers = recipe.batch_size, recipe.workers
    return (
        make_loader(train_set, transform, size, workers, training=True, seed=recipe.seed),
        make_loader(eval_set, evaluation_transform(data), size, workers, training=False),
    )


def _shard_loader(accelerator: Accelerator, loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the training batches of this process; the reader of a stream has divided its shards already."""
    own: DataLoader[Any]
    if isinstance(loader.dataset, IterableDataset):
        own = prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )
    else:
        own = accelerator.prepare(loader)
    return own


def _compiled(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Compile the model where the recipe says so; accelerate does not learn of it, so saved names are the model's."""
    compiled: Any = torch.compile(model, backend=recipe.torchcompile) if recipe.torchcompile else model
    return cast(nn.Module, compiled)
