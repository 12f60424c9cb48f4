"""One epoch of training: batches in windows, each window one optimizer step, and a place to stop after each step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor

from ...adder_layers.modules import adder_layers
from ...convert.errors import AdderkitError
from ..data.reproducible import seed_everything
from ..distributed.sharding import whole
from ..runs.journal import Journal
from ..runs.layer_scales import measure
from ..runs.progress import ProgressBar
from ..runs.signals import Interrupted, StopRequest, any_process
from ..runs.state import RunState
from .assemble import Run
from .batchnorm_snapshot import BatchNormSnapshot
from .recovery import LoaderError, loader_reason


def train_epoch(run: Run, position: RunState, stop: StopRequest, journal: Journal, save: Callable[[], None]) -> None:
    """Train from a position to the end of its epoch.

    Args:
        run: What a step needs.
        position: Where to begin; moved on after every optimizer step.
        stop: Asked after every step.
        journal: Is told what happens.
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
    started, before = time.perf_counter(), position.images
    title = f"epoch {position.epoch}/{recipe.epochs - 1}"
    losses: list[Tensor] = []  # of the window, each times its images
    images = 0
    with ProgressBar(title, batches, accelerator.is_main_process, recipe.log_interval, journal.note) as bar:
        for index, (batch, targets) in _remaining(run, position, statistics):
            if index % window == 0:
                losses, images = [], 0
                statistics.keep()
                position.lr = _schedule(run, position.epoch, index)
            # The last window may have fewer batches; its mean is over those there are.
            in_window = min(window, batches - index // window * window)
            batch, targets = run.mixing(position.epoch, batch, targets)
            with accelerator.accumulate(*run.in_training):
                with accelerator.autocast():
                    loss = run.objective(run.model, batch, targets)["loss"]
                accelerator.backward(loss * (window / in_window))  # accelerate divides by the window
                losses.append(loss.detach() * len(targets))
                images += len(targets)
                if accelerator.sync_gradients:
                    skipped = position.skipped
                    wanted = _step(run, position, statistics, torch.stack(losses).sum(), images, stop)
            rate = accelerator.num_processes * (position.images - before) / (time.perf_counter() - started)
            if accelerator.sync_gradients:
                position.batches = index + 1
                journal.step(position, rate, skipped=position.skipped > skipped)
                _save_and_stop(run, position, save, wanted)
            bar.step(lambda: _status(position, rate), done=index + 1)  # noqa: B023 - called at once


def _remaining(run: Run, position: RunState, statistics: BatchNormSnapshot) -> Iterator[tuple[int, Any]]:
    """The epoch's batches that are still to be done, numbered; each with random numbers of its own for the step."""
    loader: Any = run.train_loader
    seed, epoch, process = run.recipe.seed, position.epoch, run.accelerator.process_index
    loader.set_epoch(epoch)
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    if position.batches >= len(loader):
        return
    seed_everything(seed, epoch, process)  # for the workers of a streamed data set
    done = position.batches
    batches = iter(skip_first_batches(loader, done) if done else loader)
    for index in count(done):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            # A window may have begun, of which accelerate saves how far it is.
            statistics.restore()
            run.accelerator.step = position.batches
            raise LoaderError(loader_reason(error)) from error
        seed_everything(seed, epoch, index, process)
        yield index, batch


def _schedule(run: Run, epoch: int, batch: int) -> float:
    """Set the learning rate of the step that begins with a batch."""
    run.schedule.step_update(epoch * run.updates_per_epoch + batch // run.recipe.grad_accum_steps)
    rate: float = run.optimizer.param_groups[0]["lr"]
    return rate


def _step(
    run: Run, position: RunState, statistics: BatchNormSnapshot, loss: Tensor, images: int, stop: StopRequest
) -> bool:
    """Clip and step, the adaptive rate acting in between; or skip. Whether any process was asked to stop."""
    norm = _gradient_norm(run) + _norm(run.objective.parameters())  # a teacher that trains too is not clipped
    total = float(loss)
    broken, wanted = any_process(run.accelerator, not math.isfinite(total + float(norm)), stop.requested)
    if broken:
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.update()  # it has seen the gradient, and lowers its scale
        run.optimizer.zero_grad()
        statistics.restore()
        position.skipped += 1
        position.skipped_in_a_row += 1
        if position.skipped_in_a_row >= run.recipe.skip_limit:
            raise not_finite(run, position)
    else:
        if not position.scales or position.scales[-1]["epoch"] < position.epoch:
            position.scales = [*position.scales, measure(run.bare_model, position.epoch)]
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update(run.bare_model, run.steps_done(position) + 1)
        position.loss += total
        position.images += images
        position.skipped_in_a_row = 0
    return wanted


def _gradient_norm(run: Run) -> Tensor:
    """The norm of the model's whole gradient, unscaled and summed over processes; clipped where the recipe says so.

    Where the adaptive rate gives the adder weights' gradients their norm, those are not clipped and do not count: they
    are so much larger than all others that clipping the whole would leave next to nothing of BatchNorm's and the
    classifier's.
    """
    if not run.recipe.clip_grad:
        run.accelerator.unscale_gradients()
        return _norm(run.model.parameters())
    rescaled = [layer.weight for layer in adder_layers(run.bare_model).values()] if run.recipe.eta else []
    known = {id(weight) for weight in rescaled}
    others = [parameter for parameter in run.model.parameters() if id(parameter) not in known]
    clipped: Tensor = run.accelerator.clip_grad_norm_(others, run.recipe.clip_grad)
    return whole(clipped) + _norm(rescaled)


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return whole(norm)


def not_finite(run: Run, position: RunState) -> AdderkitError:
    """The error that ends a run which no longer learns."""
    recipe = run.recipe
    return AdderkitError(
        f"loss or gradient was not finite in the last {position.skipped_in_a_row} steps, up to epoch {position.epoch}; "
        "the last good state is in last/ of the run folder, where one was saved: start anew, from it if it is there, "
        f"with a lower --lr (now {recipe.lr:g}), with clip_grad (now {recipe.clip_grad:g}) or with amp=no "
        f"(now {recipe.amp})"
    )


def _save_and_stop(run: Run, position: RunState, save: Callable[[], None], wanted: bool) -> None:
    every = run.recipe.save_every
    last = position.batches >= len(run.train_loader)  # saved with its evaluation
    due = every and run.steps_done(position) % every == 0 and not last
    if wanted or (due and position.skipped_in_a_row == 0):
        save()
        run.model.train()
    if wanted:
        raise Interrupted


def _status(position: RunState, rate: float) -> str:
    skipped = f" skipped {position.skipped}" if position.skipped else ""
    return f"{rate:.0f} images/s loss {position.loss / max(1, position.images):.4f} lr {position.lr:.3g}{skipped}"
