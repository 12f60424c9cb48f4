"""One epoch of training: batches in windows, each window one optimizer step, and a chance to stop after each step."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor

from ...convert.conversion.targets import converted_layers
from ...convert.errors import AdderkitError
from ..data.reproducible import seed_everything
from ..distributed.sharding import full_tensor
from ..runs.journal import Journal
from ..runs.layer_scales import measure
from ..runs.progress import ProgressBar
from ..runs.signals import Interrupted, StopRequest, any_process
from ..runs.state import RunState
from .batchnorm import BatchNormSnapshot
from .prepare import Run
from .recovery import LoaderError, loader_reason


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """The end of an optimizer step, the same on all processes.

    Args:
        skipped: The step was not taken, since loss or gradient was not finite.
        stop: Some process was asked to stop.
    """

    skipped: bool
    stop: bool


def train_epoch(run: Run, state: RunState, stop: StopRequest, journal: Journal, save: Callable[[], None]) -> None:
    """Train to the end of the epoch.

    Args:
        run: Everything that a step needs.
        state: The place to begin at; updated after every optimizer step.
        stop: Asked after every step.
        journal: Receives what is logged.
        save: Saves the run as it is; called every ``save_every`` steps of the run and before stopping.

    Raises:
        AdderkitError: Loss or gradient was not finite in too many steps in a row.
        LoaderError: There are no more images; the model is as after its last step.
        Interrupted: A signal asked to stop; the run is saved.
    """
    recipe, accelerator, window = run.recipe, run.accelerator, run.recipe.grad_accum_steps
    run.model.train()
    statistics = BatchNormSnapshot(run.bare_model)
    batches = len(run.train_loader)
    started, before = time.perf_counter(), state.images
    title = f"epoch {state.epoch}/{recipe.epochs - 1}"
    rest = partial(_seconds_after, recipe.epochs - 1 - state.epoch, batches, journal.seconds_between_epochs)
    losses: list[Tensor] = []  # of the window's batches, each the values [loss, terms …] times its images
    images = 0
    with ProgressBar(title, batches, accelerator.is_main_process, recipe.log_interval, journal.note, rest) as bar:
        for index, (batch, targets) in _remaining(run, state, statistics):
            if index % window == 0:
                losses, images = [], 0
                statistics.keep()
                state.lr = scheduled_rate(run, state.epoch, index)
            # The last window may have fewer batches; its mean is over those there are.
            in_window = min(window, batches - index // window * window)
            batch, targets = run.mixing(state.epoch, batch, targets)
            with accelerator.accumulate(*run.in_training):
                with accelerator.autocast():
                    values = run.objective(run.model, batch, targets)
                accelerator.backward(values["loss"] * (window / in_window))  # accelerate divides by the window
                losses.append(torch.stack([values[name].detach() for name in run.loss_names]) * len(targets))
                images += len(targets)
                outcome = None
                if accelerator.sync_gradients:
                    outcome = _step(run, state, statistics, torch.stack(losses).sum(0), images, stop)
            if outcome is not None:
                state.batches_done = index + 1
                trained = accelerator.num_processes * (state.images - before)
                state.images_per_second = trained / (time.perf_counter() - started)
                journal.step(state, run.steps_done(state), skipped=outcome.skipped)
                _save_and_stop(run, state, save, outcome)
            bar.step(lambda: _status(state), done=index + 1)


def _seconds_after(epochs: int, batches: int, between: float, step: float) -> float:
    """Return the seconds that a run has left after this epoch.

    Args:
        epochs: Number of later epochs.
        batches: Batches of an epoch.
        between: Seconds of evaluation and save after an epoch.
        step: Seconds for a batch.
    """
    return epochs * batches * step + (epochs + 1) * between


def _remaining(run: Run, state: RunState, statistics: BatchNormSnapshot) -> Iterator[tuple[int, Any]]:
    """Yield the epoch's remaining batches, numbered; each with random numbers of its own for the step."""
    loader: Any = run.train_loader
    seed, epoch, process = run.recipe.seed, state.epoch, run.accelerator.process_index
    loader.set_epoch(epoch)
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if state.batches_done >= len(loader):
        return
    seed_everything(seed, epoch, process)  # for the workers of a streamed data set
    done = state.batches_done
    batches = iter(skip_first_batches(loader, done) if done else loader)
    for index in count(done):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            # A window may have begun, and accelerate saves how many of its batches are done.
            statistics.restore()
            run.accelerator.step = state.batches_done
            raise LoaderError(loader_reason(error)) from error
        seed_everything(seed, epoch, index, process)
        yield index, batch


def scheduled_rate(run: Run, epoch: int, batch: int) -> float:
    """Set the learning rate of the step that begins with a batch, and return it."""
    run.schedule.step_update(epoch * run.updates_per_epoch + batch // run.recipe.grad_accum_steps)
    rate: float = run.optimizer.param_groups[0]["lr"]
    return rate


def _step(
    run: Run, state: RunState, statistics: BatchNormSnapshot, losses: Tensor, images: int, stop: StopRequest
) -> StepOutcome:
    """Clip and take the optimizer step, the adaptive rate acting in between; or skip it.

    Args:
        run: Everything that a step needs.
        state: Receives the sums of the losses.
        statistics: Those from before the step.
        losses: Sums of ``run.loss_names`` over the step's images, ``[values]``.
        images: Number of those images.
        stop: Asked whether to stop.
    """
    norm = _gradient_norm(run) + _norm(run.objective.parameters())  # a teacher that trains too is not clipped
    sums = losses.tolist()
    broken, wanted = any_process(run.accelerator, not math.isfinite(sums[0] + float(norm)), stop.requested)
    if broken:
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.update()  # it has seen the gradient, and lowers its scale
        run.optimizer.zero_grad()
        statistics.restore()
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= run.recipe.skip_limit:
            raise not_finite(run, state)
    else:
        if not state.layer_scales or state.layer_scales[-1]["epoch"] < state.epoch:
            state.layer_scales = [*state.layer_scales, measure(run.bare_model, state.epoch)]
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update(run.bare_model, run.steps_done(state) + 1)
        for name, value in zip(run.loss_names, sums, strict=True):
            state.losses[name] += value
        state.images += images
        state.skipped_in_a_row = 0
    return StepOutcome(broken, wanted)


def _gradient_norm(run: Run) -> Tensor:
    """Return the norm of the model's whole gradient, unscaled and over all processes; clip where the recipe says so.

    Where the adaptive rate gives the adder weights' gradients their norm, those are not clipped and do not count: they
    are so much larger than all others that clipping the whole would leave next to nothing of BatchNorm's and the
    classifier's.
    """
    if not run.recipe.clip_grad:
        run.accelerator.unscale_gradients()
        return _norm(run.model.parameters())
    rescaled = (
        [layer.weight for layer in converted_layers(run.bare_model, "adaptive_rate").values()] if run.recipe.eta else []
    )
    known = {id(weight) for weight in rescaled}
    others = [parameter for parameter in run.model.parameters() if id(parameter) not in known]
    clipped: Tensor = run.accelerator.clip_grad_norm_(others, run.recipe.clip_grad)
    return full_tensor(clipped) + _norm(rescaled)


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return full_tensor(norm)


def not_finite(run: Run, state: RunState) -> AdderkitError:
    """Make the error that ends a run which no longer learns."""
    recipe = run.recipe
    return AdderkitError(
        f"loss or gradient was not finite in the last {state.skipped_in_a_row} steps, up to epoch {state.epoch}; "
        "the last good state is in last/ of the run folder, if one was saved: start a new run, from it if it is there, "
        f"with a lower --lr (now {recipe.lr:g}), with clip_grad (now {recipe.clip_grad:g}) or with amp=no "
        f"(now {recipe.amp})"
    )


def _save_and_stop(run: Run, state: RunState, save: Callable[[], None], outcome: StepOutcome) -> None:
    """Save after a step where that is due, and stop where that is wanted."""
    every = run.recipe.save_every
    last = state.batches_done >= len(run.train_loader)  # saved with its evaluation
    due = every and run.steps_done(state) % every == 0 and not last
    if outcome.stop or (due and state.skipped_in_a_row == 0):
        save()
        run.model.train()
    if outcome.stop:
        raise Interrupted


def _status(state: RunState) -> str:
    means = " ".join(f"{name} {value:.4f}" for name, value in state.mean_losses().items())
    skipped = f" skipped {state.skipped}" if state.skipped else ""
    return f"{state.images_per_second or 0:.0f} images/s {means} lr {state.lr:.3g}{skipped}"
