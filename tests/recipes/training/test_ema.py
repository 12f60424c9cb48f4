"""The moving average of the weights: its formula, its statistics, and which model is kept as the best."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.data.datasets import DataConfig, open_dataset, subset
from adderkit.recipes.data.loaders import plain_batches
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.runs.state import AVERAGE_COLUMNS, COLUMNS
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job
from adderkit.recipes.verbs.evaluate import evaluate_model


@pytest.fixture
def weights_after_each_step(monkeypatch):
    """Weights of the model in training, by name: at the start of an epoch, then after each step that is taken."""
    kept, models = [], []
    train_epoch = finetune.train_epoch

    def keep(*_):
        kept.append({name: value.detach().double() for name, value in models[-1].named_parameters()})

    def watched(run, *rest):
        models.append(run.bare_model)
        keep()
        train_epoch(run, *rest)

    monkeypatch.setattr(finetune, "train_epoch", watched)
    handle = register_optimizer_step_post_hook(keep)
    yield kept
    handle.remove()


def average_of(folder):
    return load_file(folder.last / "state" / "model_ema.safetensors")


@pytest.mark.parametrize(("warmup", "skipped"), [(False, None), (True, None), (True, 2), (False, 0)], ids=str)
def test_formula(warmup, skipped, train, weights_after_each_step, monkeypatch):
    """``average = d · average + (1 - d) · weights`` after each step taken; d is 0 in the first."""
    count, loss = iter(range(100)), Objective.forward

    def poisoned(self, *args):
        values = loss(self, *args)
        return {**values, "loss": values["loss"] * (math.nan if next(count) == skipped else 1)}

    monkeypatch.setattr(Objective, "forward", poisoned)
    _, folder = train(batch_size=16, model_ema=True, model_ema_decay=0.6, model_ema_warmup=warmup)
    first, *steps = weights_after_each_step
    numbers = [number for number in range(4) if number != skipped]
    assert len(steps) == len(numbers)
    expected = first
    for number, weights in zip(numbers, steps, strict=True):
        decay = min(1 - (1 + number) ** (-2 / 3), 0.6) if warmup else 0.6 * (number > 0)
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    actual = average_of(folder)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-6)
    assert any(not actual[name].double().allclose(value) for name, value in steps[-1].items())


def test_the_best_is_the_best_average(train):
    """Its report and its metrics are the average's, the last model's those of the weights in training."""
    rows, folder = train(epochs=2, batch_size=16, train_images=320, model_ema=True, model_ema_decay=0.9)
    assert (folder.path / "summary.csv").read_text().splitlines()[0] == ",".join((*COLUMNS, *AVERAGE_COLUMNS))
    best = max(rows, key=lambda row: row["eval_top1_ema"])
    for place, row, suffix in ((folder.best, best, "_ema"), (folder.last, rows[-1], "")):
        metrics = evaluate_model(ModelSource(str(place)), "digits", None, "validation", 32, 0)
        found = (metrics.loss, metrics.top1, metrics.top5)
        assert found == pytest.approx([row[f"eval_{name}{suffix}"] for name in ("loss", "top1", "top5")])
        report = json.loads((place / "adder_report.json").read_text())
        assert report["metrics"]["validation"]["top1"] == row[f"eval_top1{suffix}"]
    assert rows[-1]["eval_loss"] != rows[-1]["eval_loss_ema"]


def test_statistics_of_the_average_are_reestimated(train, adder_folder):
    _, folder = train(
        "distill", job=Job(ModelSource(str(adder_folder))), lr=0.1, batch_size=16, model_ema=True, model_ema_decay=0.5
    )
    best, measured = adderkit.load(folder.best), adderkit.load(folder.best)
    images = subset(open_dataset("digits", None, "train", 1), 64, 0)  # as the run has chosen them
    reestimate_batchnorm_(measured, plain_batches(images, DataConfig.of(measured), 64, 0, 16))
    for name, value in best.state_dict().items():
        torch.testing.assert_close(value, measured.state_dict()[name], msg=name)
    average = average_of(folder)
    assert all(value.equal(average[name]) for name, value in best.state_dict().items())


def test_off_by_default(train):
    rows, folder = train()
    assert set(rows[0]) == set(COLUMNS)
    assert not (folder.last / "state" / "model_ema.safetensors").exists()
