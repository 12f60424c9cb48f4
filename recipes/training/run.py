"""The way of a run: epochs, BatchNorm measured afresh before every evaluation and save, and going on after a stop."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from timm.utils import distribute_bn
from torch import nn

from ...convert.calibration.batchnorm import batch_norms, reestimate_batchnorm_
from ...convert.checkpoint.folder import load
from ...convert.errors import RecipeError
from ...convert.model_source import ModelSource
from ...convert.record import require_float_weights
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, plain_batches
from ..distributed.sync_batchnorm import each_process_alone
from ..objectives.terms import teacher_need
from ..runs.folder import RunFolder
from ..runs.journal import Journal
from ..runs.plan import device_name
from ..runs.provenance import command_line, commands_of, weights_origin
from ..runs.signals import Interrupted, StopRequest, any_process
from ..runs.state import AVERAGE_COLUMNS, Row, RunState, gather_sums
from .assemble import Run, make_accelerator, prepare
from .epoch import not_finite, train_epoch
from .evaluate import Metrics, evaluate
from .models import Job, build_student, draw_adder_weights, teacher_of
from .qat import prepare_qat_
from .recovery import LoaderError, begun_before


def start(job: Job, recipe: Recipe, folder: RunFolder) -> list[Row]:
    """Begin a run and carry it to its end.

    Args:
        job: The model, its teacher and its weights.
        recipe: All settings.
        folder: A folder that holds no run yet.

    Returns:
        The rows of ``summary.csv``.

    Raises:
        AdderkitError: Something does not fit, is missing, or the loss is no longer finite.
        Interrupted: A signal asked to stop; the run is saved.
    """
    accelerator = make_accelerator(recipe, folder.path)
    # Each process named the folder by its own clock.
    folder = RunFolder(broadcast_object_list([str(folder.path)])[0])
    model = _first_model(job, recipe)
    teacher = teacher_of(job) if teacher_need(recipe) else None
    job = Job(
        source=job.source.absolute(),
        teacher=None if teacher is None else ModelSource(teacher).absolute().name,
        command=command_line(),
    )
    if recipe.data_dir and Path(recipe.data_dir).exists():  # it may be an address
        recipe = recipe.changed({"data_dir": str(Path(recipe.data_dir).resolve())})
    arguments = {"job": dataclasses.asdict(job), "recipe": recipe.to_dict()}
    if broadcast_object_list([begun_before(folder, arguments)])[0]:
        return resume(folder)
    run = prepare(job, recipe, accelerator, model)
    if accelerator.is_main_process:
        folder.start({"id": token_hex(4), **arguments})
    accelerator.wait_for_everyone()
    return _train(run, job, folder, RunState())


def resume(folder: RunFolder) -> list[Row]:
    """Continue a run where it was saved last, with the arguments it was begun with; it ends as if never stopped.

    Args:
        folder: A folder that ``start`` wrote.

    Returns:
        The rows of ``summary.csv``, those from before included.

    Raises:
        AdderkitError: There is no run in the folder, or no save in it is whole.
        Interrupted: See ``start``.
    """
    if is_main_process():
        folder.recover(_say)
    PartialState().wait_for_everyone()
    job, recipe = _read_arguments(folder)
    accelerator = make_accelerator(recipe, folder.path)
    model = load(folder.last) if folder.last.is_dir() else _first_model(job, recipe)
    run = prepare(job, recipe, accelerator, model)
    return _train(run, job, folder, folder.load_last(accelerator))


def _first_model(job: Job, recipe: Recipe) -> nn.Module:
    """The model that a run begins with."""
    model = build_student(job, recipe)
    require_float_weights(model, "trained", "train the network that it was made from, with --recipe int8-qat")
    if recipe.adder_init == "normal":
        draw_adder_weights(model)
    if recipe.bits:
        prepare_qat_(model, recipe)
    return model


def is_main_process() -> bool:
    """Whether this process speaks for all of a run's processes."""
    return bool(PartialState().is_main_process)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _read_arguments(folder: RunFolder) -> tuple[Job, Recipe]:
    arguments = folder.arguments()
    job, recipe = arguments.get("job"), arguments.get("recipe")
    damaged = f"{folder.path / 'args.yaml'} is damaged: expected a job and a recipe as finetune wrote them"
    if not isinstance(recipe, dict):
        raise RecipeError(damaged)
    try:
        return Job.from_dict(job), Recipe().changed(recipe)
    except TypeError as error:
        raise RecipeError(damaged) from error


def _train(run: Run, job: Job, folder: RunFolder, position: RunState) -> list[Row]:
    """From a position to the end of the last epoch, or until a signal asks to stop."""
    with Journal(run, folder) as journal, StopRequest(run.accelerator) as stop:
        journal.open(position)
        while position.epoch < run.recipe.epochs:
            save_now = partial(_save_within_epoch, run, job, folder, position)
            try:
                train_epoch(run, position, stop, journal, save_now)
            except LoaderError:
                if run.accelerator.num_processes == 1:  # several would wait for the one that has no images
                    save_now()
                raise
            _finish_epoch(run, job, folder, journal, position)
            if any_process(run.accelerator, stop.requested)[0] and position.epoch < run.recipe.epochs:
                raise Interrupted
    run.accelerator.end_training()
    return position.rows


def _finish_epoch(run: Run, job: Job, folder: RunFolder, journal: Journal, position: RunState) -> None:
    """Evaluate, and save last and perhaps best; but not a model whose steps and evaluation are not finite any more."""
    title = f"epoch {position.epoch} evaluation"
    _refresh_batchnorm(run, run.bare_model)
    metrics = evaluate(run.model, run.eval_loader, run.accelerator, title, journal.note)
    lost = position.skipped_in_a_row > 0 and not math.isfinite(metrics.loss)
    if lost and position.epoch + 1 == run.recipe.epochs:
        raise not_finite(run, position)
    sums = torch.tensor(gather_sums(position, run.accelerator), dtype=torch.float64).sum(0)
    row = {
        "epoch": position.epoch,
        "train_loss": float(sums[0] / sums[1]),
        "eval_loss": metrics.loss,
        "eval_top1": metrics.top1,
        "eval_top5": metrics.top5,
        "lr": position.lr,
    }
    best, best_metrics, column = run.bare_model, metrics, "eval_top1"
    if run.average is not None:
        best, column = run.average.module, "eval_top1_ema"
        _refresh_batchnorm(run, best, reduce=False)
        best_metrics = evaluate(best, run.eval_loader, run.accelerator, f"{title}, moving average", journal.note)
        found = (best_metrics.loss, best_metrics.top1, best_metrics.top5)
        row |= dict(zip(AVERAGE_COLUMNS, found, strict=True))
    better = all(row[column] > before[column] for before in position.rows)
    report, best_report = (_report(run, job, position, each) for each in (metrics, best_metrics))
    position.next_epoch(row)
    journal.epoch(position)
    if lost:
        return
    if better:
        state = run.accelerator.get_state_dict(best)
        if run.accelerator.is_main_process:
            folder.save_best(best, best_report, state)
    folder.save_last(run.bare_model, run.accelerator, position, report)
    journal.write_tables(position)


def _save_within_epoch(run: Run, job: Job, folder: RunFolder, position: RunState) -> None:
    """Save the state as it is, and the model as it would be evaluated; training goes on as if not saved."""
    report = _report(run, job, position, None)
    folder.save_last(run.bare_model, run.accelerator, position, report, _as_evaluated(run))


@contextmanager
def _as_evaluated(run: Run) -> Iterator[None]:
    """Inside, BatchNorm has the statistics of an evaluation; afterwards those from before."""
    buffers = [buffer for norm in batch_norms(run.bare_model) for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    _refresh_batchnorm(run, run.bare_model)
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _refresh_batchnorm(run: Run, model: nn.Module, *, reduce: bool = True) -> None:
    """Before evaluation and saving: measure an adder network's statistics afresh, and make all processes agree.

    Args:
        run: It has the images to measure on.
        model: The model in training, or its moving average.
        reduce: Take the mean over processes; else those of the first, which are what its saved state continues from.
    """
    recipe = run.recipe
    if run.norm_images is not None:
        config = DataConfig.of(model)
        batches = plain_batches(run.norm_images, config, recipe.bn_images, recipe.seed, recipe.batch_size)
        with each_process_alone(model):
            reestimate_batchnorm_(model, batches)
    if run.accelerator.num_processes > 1:
        distribute_bn(model, run.accelerator.num_processes, reduce=reduce)


def _report(run: Run, job: Job, position: RunState, metrics: Metrics | None) -> dict[str, Any]:
    """Facts for ``adder_report.json``: what the converted folder said, and what this run measured."""
    before = job.source.report()
    known = ("plan", "calibration", "pruning", "teacher", "imported")
    kept: dict[str, Any] = {key: before[key] for key in known if key in before}
    kept["source"] = weights_origin(job.source, run.bare_model)
    kept["commands"] = commands_of(before, job.command)
    if job.teacher is not None:
        kept["teacher"] = job.teacher
    training = {
        "recipe": run.recipe.to_dict(),
        "epoch": position.epoch,
        "batches": position.batches,
        "processes": run.accelerator.num_processes,
        "device": device_name(run.accelerator.device),
        "images_per_second": run.images_per_second,
        "skipped_steps": position.skipped,
    }
    measured = {} if metrics is None else {"metrics": {run.recipe.val_split: metrics.to_dict()}}
    return {**kept, "training": training, **measured}
