"""The training loop: distillation, the adaptive rate, BatchNorm measured afresh, and a save after every epoch."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from timm.utils import distribute_bn
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..convert.batchnorm import reestimate_batchnorm_
from ..convert.checkpoint import load, read_report
from ..convert.errors import AdderkitError, RecipeError
from ..convert.source import is_folder
from .data import DataConfig, plain_batches
from .distillation import distillation_loss
from .evaluate import Metrics, evaluate
from .prepare import Run, make_accelerator, prepare
from .progress import ProgressBar
from .recipe import Recipe
from .run_folder import Row, RunFolder
from .setup import Job, absolute_source, build_student, teacher_of


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
    """
    accelerator = make_accelerator(recipe)
    model = build_student(job, recipe)
    job = dataclasses.replace(
        job,
        model=absolute_source(job.model) or job.model,
        teacher=absolute_source(teacher_of(job)) if recipe.distill_loss_weight else None,
        checkpoint=str(Path(job.checkpoint).resolve()) if job.checkpoint else None,
    )
    if recipe.data_dir:
        recipe = recipe.changed({"data_dir": str(Path(recipe.data_dir).resolve())})
    run = prepare(job, recipe, accelerator, model)
    if accelerator.is_main_process:
        folder.start({"job": dataclasses.asdict(job), "recipe": recipe.to_dict()})
    accelerator.wait_for_everyone()
    return _train(run, job, folder, [])


def resume(folder: RunFolder) -> list[Row]:
    """Continue a run after its last finished epoch, with the arguments it was begun with.

    Args:
        folder: A folder that ``start`` wrote.

    Returns:
        The rows of ``summary.csv``, those from before included.

    Raises:
        AdderkitError: There is no run in the folder, or its state is damaged.
    """
    job, recipe = _read_arguments(folder)
    accelerator = make_accelerator(recipe)
    model = load(folder.last) if folder.last.is_dir() else build_student(job, recipe)
    run = prepare(job, recipe, accelerator, model)
    rows = folder.load_last(accelerator)
    if rows and accelerator.is_main_process:
        folder.write_summary(rows)  # a kill may have come between the state and the summary
    return _train(run, job, folder, rows)


def is_main_process() -> bool:
    """Whether this process speaks for all of a run's processes."""
    return bool(PartialState().is_main_process)


def _read_arguments(folder: RunFolder) -> tuple[Job, Recipe]:
    arguments = folder.arguments()
    job, recipe = arguments.get("job"), arguments.get("recipe")
    fields = {field.name for field in dataclasses.fields(Job)}
    if not isinstance(job, dict) or not isinstance(recipe, dict) or set(job) != fields:
        raise RecipeError(f"{folder.path / 'args.yaml'} is damaged: expected a job and a recipe as finetune wrote them")
    return Job(**job), Recipe().changed(recipe)


def _train(run: Run, job: Job, folder: RunFolder, rows: list[Row]) -> list[Row]:
    for epoch in range(len(rows), run.recipe.epochs):
        loss, rate = _train_epoch(run, epoch)
        _refresh_batchnorm(run)
        metrics = evaluate(run.model, run.eval_loader, run.accelerator, f"epoch {epoch} evaluation")
        row = {
            "epoch": epoch,
            "train_loss": loss,
            "eval_loss": metrics.loss,
            "eval_top1": metrics.top1,
            "eval_top5": metrics.top5,
            "lr": rate,
        }
        best = not rows or metrics.top1 > max(before["eval_top1"] for before in rows)
        rows = [*rows, row]
        report = _report(run, job, metrics, epoch)
        if run.accelerator.is_main_process and best:
            folder.save_best(run.bare_model, report)
        folder.save_last(run.bare_model, run.accelerator, rows, report)
        if run.accelerator.is_main_process:
            folder.write_summary(rows)
    run.accelerator.end_training()
    return rows


def _train_epoch(run: Run, epoch: int) -> tuple[float, float]:
    """One pass over the training images; the mean loss and the last learning rate."""
    recipe, accelerator = run.recipe, run.accelerator
    run.model.train()
    run.train_loader.set_epoch(epoch)  # type: ignore[attr-defined]
    total, images, window = torch.zeros((), device=accelerator.device), 0, recipe.grad_accum_steps
    updates, batches = epoch * run.updates_per_epoch, len(run.train_loader)
    run.schedule.step_update(updates)
    started = time.perf_counter()
    title = f"epoch {epoch}/{recipe.epochs - 1}"
    with ProgressBar(title, batches, accelerator.is_main_process, recipe.log_interval) as bar:
        for index, (batch, targets) in enumerate(run.train_loader):
            rate = run.optimizer.param_groups[0]["lr"]
            # The last window may have fewer batches; its mean is over those there are.
            in_window = min(window, batches - index // window * window)
            with accelerator.accumulate(run.model):
                loss = _loss(run, batch, targets)
                accelerator.backward(loss * (window / in_window))  # accelerate divides by the window
                _update(run)
            if accelerator.sync_gradients:
                updates += 1
                run.schedule.step_update(updates)
            total += loss.detach() * len(targets)
            images += len(targets)
            bar.step(lambda: _status(accelerator.num_processes * images, started, total / images, rate))  # noqa: B023
    return _mean_loss(run, total, images, epoch), rate


def _loss(run: Run, batch: Tensor, targets: Tensor) -> Tensor:
    recipe = run.recipe
    with run.accelerator.autocast():
        logits = run.model(batch)
    loss: Tensor = logits.new_zeros((), dtype=torch.float32)
    if recipe.task_loss_weight:
        task = cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing)
        loss = loss + recipe.task_loss_weight * task
    if run.teacher is not None:
        with run.accelerator.autocast():
            expected = run.teacher(batch)
        loss = loss + recipe.distill_loss_weight * distillation_loss(logits, expected, recipe.kd_temperature)
    return loss


def _update(run: Run) -> None:
    """Clip and step, the adaptive rate acting in between; within a window of accumulation, accelerate does neither."""
    if run.recipe.clip_grad and run.accelerator.sync_gradients:
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.recipe.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad()


def _status(images: int, started: float, loss: Tensor, rate: float) -> str:
    return f"{images / (time.perf_counter() - started):.0f} images/s loss {float(loss):.4f} lr {rate:.3g}"


def _mean_loss(run: Run, total: Tensor, images: int, epoch: int) -> float:
    counts: Tensor = run.accelerator.reduce(torch.stack([total, total.new_tensor(images)]), reduction="sum")
    mean = float(counts[0] / counts[1])
    if not math.isfinite(mean):
        raise AdderkitError(
            f"the training loss is {mean} in epoch {epoch}; lower --lr (now {run.recipe.lr}) or set clip_grad, "
            "then start again or resume the epoch before"
        )
    return mean


def _refresh_batchnorm(run: Run) -> None:
    """Before evaluation and saving: measure an adder network's statistics afresh, and make all processes agree."""
    model, recipe = run.bare_model, run.recipe
    if run.norm_images is not None:
        config = DataConfig.of(model)
        batches = plain_batches(run.norm_images, config, recipe.bn_images, recipe.seed, recipe.batch_size)
        reestimate_batchnorm_(model, batches)
    if run.accelerator.num_processes > 1:
        distribute_bn(model, run.accelerator.num_processes, reduce=True)


def _report(run: Run, job: Job, metrics: Metrics, epoch: int) -> dict[str, Any]:
    """Facts for ``adder_report.json``: what the converted folder said, and what this run measured."""
    before = read_report(job.model) if is_folder(job.model) else {}
    kept: dict[str, Any] = {key: before[key] for key in ("plan", "calibration", "teacher", "source") if key in before}
    if job.teacher is not None:
        kept["teacher"] = job.teacher
    training = {"recipe": run.recipe.to_dict(), "epoch": epoch, "processes": run.accelerator.num_processes}
    return {**kept, "training": training, "metrics": {run.recipe.val_split: metrics.to_dict()}}
