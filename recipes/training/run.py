"""The training run: epochs, BatchNorm re-estimation before evaluation, checkpointing and resuming."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import IterableDataset

from ...convert.checkpoint.folder import CONFIG, load
from ...convert.checkpoint.report import Report
from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from ..distributed.connect import connect
from ..distributed.exchange import from_main, local_copy, require_same, require_shared
from ..distributed.process_statistics import restore_process_statistics
from ..distributed.worker import tell_launcher
from ..objectives.terms import teacher_need
from ..runs.continuation import changed_settings, differences, keep_step
from ..runs.folder import RunFolder
from ..runs.journal import Journal
from ..runs.kept_teacher import TEACHER, kept_in
from ..runs.layer_scales import watched_layers
from ..runs.lock import folder_lock
from ..runs.plan import device_name
from ..runs.provenance import DataChoice, absolute_if_local, command_line, weights_origin
from ..runs.signals import Interrupted, StopRequest, any_process
from ..runs.state import AVERAGE_COLUMNS, Row, RunState, gather_sums, loss_columns, mean_losses
from .assemble import assemble, first_model, open_data
from .batchnorm import as_evaluated, refresh_batchnorm
from .epoch import not_finite, scheduled_rate, train_epoch
from .evaluate import Metrics, evaluate
from .models import Job, keep_teacher, teacher_of
from .prepare import Run, make_accelerator, prepare
from .recovery import LoaderError, resume_command


def start(job: Job, recipe: Recipe, folder: RunFolder) -> list[Row]:
    """Begin a run and train to its end.

    Args:
        job: The model, its teacher and its weights.
        recipe: All settings.
        folder: A folder that holds no run yet.

    Returns:
        The rows of ``summary.csv``.

    Raises:
        AdderkitError: The folder holds a run, something does not fit or is missing, or the loss is no longer finite.
        Interrupted: A signal asked to stop; the run is saved.
    """
    connect()
    folder.require_empty()
    accelerator = make_accelerator(recipe, folder.path)
    folder = RunFolder(from_main(str(folder.path)))  # each process named it by its own clock
    model = first_model(job, recipe)
    teacher = teacher_of(job) if teacher_need(recipe) else None
    job = dataclasses.replace(job, teacher=teacher, command=command_line()).absolute()
    if recipe.data_dir:  # it may be an address
        recipe = recipe.changed({"data_dir": absolute_if_local(recipe.data_dir)})
    if recipe.class_map:  # it may be beside the images
        recipe = recipe.changed({"class_map": absolute_if_local(recipe.class_map)})
    run = _assemble_and_prepare(job, recipe, model, accelerator)
    with _alone(folder):
        if accelerator.is_main_process:
            values = {"id": token_hex(4), "job": dataclasses.asdict(job), "recipe": recipe.to_dict()}
            folder.start({**values, "processes": accelerator.num_processes})
            tell_launcher(resume=resume_command(folder))
            keep_teacher(job, model).write(folder.path)
        accelerator.wait_for_everyone()
        if accelerator.is_fsdp2:
            require_shared(folder.path)
        return _train(run, job, folder, RunState())


def resume(folder: RunFolder, changes: Mapping[str, Any] | None = None) -> list[Row]:
    """Resume a run from its last save, with the arguments it was begun with; it ends as if it had never stopped.

    Args:
        folder: A folder that ``start`` wrote; only the main process needs to see it.
        changes: Settings to change from here on; see ``runs.continuation``.

    Returns:
        The rows of ``summary.csv``, those from before included.

    Raises:
        AdderkitError: There is no run in the folder, no save in it is intact, or a setting cannot be changed.
        Interrupted: A signal asked to stop; the run is saved.
    """
    main = connect().is_main_process
    folder = RunFolder(from_main(str(folder.path)))
    arguments = from_main(folder.arguments() if main else None)
    with _alone(folder):
        if main:
            folder.recover(_say)
            tell_launcher(resume=resume_command(folder))
        PartialState().wait_for_everyone()
        job, before, processes = _read_arguments(folder, arguments)
        recipe = keep_step(changed_settings(before, changes or {}), processes, PartialState().num_processes)
        accelerator = make_accelerator(recipe, folder.path)
        if accelerator.is_fsdp2:
            require_shared(folder.path)
        with local_copy(folder.last) as last, local_copy(folder.path / TEACHER) as teacher:
            model = load(last) if last.is_dir() else first_model(job, recipe)
            run = _assemble_and_prepare(_taught_by(job, teacher), recipe, model, accelerator)
            state = folder.load_last(accelerator, last)
            restore_process_statistics(accelerator, run.bare_model, last / "state")
        if main and kept_in(folder.path) is None:  # the run was killed at its very beginning
            keep_teacher(job, model).write(folder.path)
        changed = _changes(run, state, before, processes)
        if main and changed:
            place = {"epoch": state.epoch, "batches": state.batches_done, "command": command_line()}
            resumed = [*arguments.get("resumed", []), {**place, "changes": changed}]
            new = {"recipe": recipe.to_dict(), "processes": accelerator.num_processes, "resumed": resumed}
            folder.write_arguments({**arguments, **new})
        return _train(run, job, folder, state, _lines(changed))


def _taught_by(job: Job, kept: Path) -> Job:
    """Return the job with the teacher that the run has kept, if it distills and has kept one."""
    if job.teacher is None or not (kept / CONFIG).is_file():
        return job
    return dataclasses.replace(job, teacher=str(kept), teacher_checkpoint=None)


def _changes(run: Run, state: RunState, before: Recipe, processes: int) -> dict[str, list[Any]]:
    """Return what a resumed run changes: names of settings, each with its value before and now.

    Raises:
        RecipeError: The run has more epochs behind it than it is to have.
    """
    epochs = run.recipe.epochs
    if state.epoch > epochs:
        raise RecipeError(f"epochs is {epochs}, expected at least {state.epoch}, as many as the run has finished")
    changed = differences(before, run.recipe)
    if run.accelerator.num_processes != processes:
        changed["processes"] = [processes, run.accelerator.num_processes]
    dealt = [name for name in ("processes", "workers") if name in changed]
    if dealt and state.batches_done and isinstance(run.train_loader.dataset, IterableDataset):
        old, new = changed[dealt[0]]
        raise RecipeError(
            f"{dealt[0]} is {new}, expected {old} as before: within an epoch of a streamed data set, it decides which "
            "images are left; resume without the change"
        )
    if changed and 0 < state.epoch < epochs and state.lr:
        changed["next learning rate"] = [state.lr, scheduled_rate(run, state.epoch, state.batches_done)]
    return changed


def _lines(changed: Mapping[str, list[Any]]) -> list[str]:
    """Return a line for each change, with short numbers."""

    def short(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    return [f"{name}: {short(old)} -> {short(new)}" for name, (old, new) in changed.items()]


def _alone(folder: RunFolder) -> AbstractContextManager[None]:
    """Hold the lock of a run folder, on the main process, which alone writes to it."""
    return folder_lock(folder.path, _say) if is_main_process() else nullcontext()


def _assemble_and_prepare(job: Job, recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> Run:
    """Assemble everything that a step needs, and hand it to accelerate."""
    data = open_data(recipe, model)
    require_same("images of training and evaluation", [data.images, data.evaluation_images])
    return prepare(assemble(job, recipe, model, data, processes=accelerator.num_processes), accelerator)


def is_main_process() -> bool:
    """Return whether this is the main process of the run."""
    return bool(PartialState().is_main_process)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read_arguments(folder: RunFolder, arguments: Mapping[str, Any]) -> tuple[Job, Recipe, int]:
    """Return the models, the settings and the number of processes of a run."""
    job, recipe, processes = (arguments.get(name) for name in ("job", "recipe", "processes"))
    damaged = f"{folder.path / 'args.yaml'} is damaged: expected a job and a recipe as finetune wrote them"
    if not isinstance(recipe, dict) or type(processes) is not int or processes < 1:
        raise RecipeError(damaged)
    try:
        return Job.from_dict(job), Recipe().changed(recipe), processes
    except TypeError as error:
        raise RecipeError(damaged) from error


def _train(run: Run, job: Job, folder: RunFolder, state: RunState, notes: Sequence[str] = ()) -> list[Row]:
    """Train from a state to the end of the last epoch, or until a signal asks to stop; log notes first."""
    state.losses = {name: state.losses.get(name, 0.0) for name in run.loss_names}
    layers = list(watched_layers(run.bare_model))
    with Journal(run.accelerator, run.plan, folder, layers) as journal, StopRequest(run.accelerator) as stop:
        journal.open(state, run.steps_done(state))
        for note in notes:
            journal.say(note)
        if state.epoch >= run.recipe.epochs:
            journal.say(f"the run has finished its {state.epoch} epochs; --epochs N extends it")
        while state.epoch < run.recipe.epochs:
            save_now = partial(_save_within_epoch, run, job, folder, state)
            try:
                train_epoch(run, state, stop, journal, save_now)
            except LoaderError:
                if run.accelerator.num_processes == 1:  # several would wait for the one that has no images
                    save_now()
                raise
            trained = time.perf_counter()
            _finish_epoch(run, job, folder, journal, state)
            journal.seconds_between_epochs = time.perf_counter() - trained
            if any_process(run.accelerator, stop.requested)[0] and state.epoch < run.recipe.epochs:
                raise Interrupted
    run.accelerator.end_training()
    return state.rows


def _finish_epoch(run: Run, job: Job, folder: RunFolder, journal: Journal, state: RunState) -> None:
    """Evaluate, and save last and perhaps best; but not a model whose steps and evaluation are no longer finite."""
    title = f"epoch {state.epoch} evaluation"
    refresh_batchnorm(run, run.bare_model)
    metrics = evaluate(run.model, run.eval_loader, run.accelerator, title, journal.note)
    lost = state.skipped_in_a_row > 0 and not math.isfinite(metrics.loss)
    if lost and state.epoch + 1 == run.recipe.epochs:
        raise not_finite(run, state)
    means = mean_losses(gather_sums(state, run.accelerator))
    row = {
        "epoch": state.epoch,
        "train_loss": means["loss"],
        "eval_loss": metrics.loss,
        "eval_top1": metrics.top1,
        "eval_top5": metrics.top5,
        "lr": state.lr,
    }
    best, best_metrics, column = run.bare_model, metrics, "eval_top1"
    if run.average is not None:
        best, column = run.average.module, "eval_top1_ema"
        refresh_batchnorm(run, best, reduce=False)
        best_metrics = evaluate(best, run.eval_loader, run.accelerator, f"{title}, moving average", journal.note)
        found = (best_metrics.loss, best_metrics.top1, best_metrics.top5)
        row |= dict(zip(AVERAGE_COLUMNS, found, strict=True))
    row |= loss_columns(means)
    better = all(row[column] > before[column] for before in state.rows)
    report, best_report = (_report(run, job, folder, state, each) for each in (metrics, best_metrics))
    state.next_epoch(row)
    journal.epoch(state, run.steps_done(state))
    if lost:
        return
    if better:
        weights = run.accelerator.get_state_dict(best)
        if run.accelerator.is_main_process:
            folder.save_best(best, best_report, weights)
    folder.save_last(run.bare_model, run.accelerator, state, report)
    journal.write_tables(state)


def _save_within_epoch(run: Run, job: Job, folder: RunFolder, state: RunState) -> None:
    """Save the state as it is, and the model as it would be evaluated; training continues as if not saved."""
    report = _report(run, job, folder, state, None)
    folder.save_last(run.bare_model, run.accelerator, state, report, as_evaluated(run))


def _report(run: Run, job: Job, folder: RunFolder, state: RunState, metrics: Metrics | None) -> Report:
    """Return the report of the model as it is now: what the converted folder recorded, and what this run measured."""
    before = job.source.report()
    return before.after(
        "finetune",
        job.command,
        source=weights_origin(job.source, run.bare_model),
        teacher=TEACHER if kept_in(folder.path) else job.teacher or before.teacher,
        data=DataChoice.of_recipe(run.recipe).facts(),
        training={
            "recipe": run.recipe.to_dict(),
            "epoch": state.epoch,
            "batches": state.batches_done,
            "processes": run.accelerator.num_processes,
            "device": device_name(run.accelerator.device),
            "images_per_second": state.images_per_second,
            "skipped_steps": state.skipped,
        },
        metrics={} if metrics is None else {run.recipe.val_split: metrics.to_dict()},
    )
