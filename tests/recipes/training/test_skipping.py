"""Steps whose loss or gradient is not finite."""

import json
import math

import pytest
import torch
from accelerate.utils import AutocastKwargs
from torch.optim.optimizer import register_optimizer_step_post_hook

import adderkit
from adderkit.convert.errors import AdderkitError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.objectives.objective import Objective
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job


@pytest.fixture
def poison(monkeypatch, steep):
    """Give some of a run's batches, counted from 0, images of NaN, or let their loss or gradient be infinite."""

    def patch(kind, *which):
        count = iter(range(1000))
        plain = Objective.forward

        def poisoned(self, model, batch, targets):
            if next(count) not in which:
                return plain(self, model, batch, targets)
            if kind == "images":
                return plain(self, model, batch * math.nan, targets)
            values = plain(self, model, batch, targets)
            value = values["loss"]
            broken = {"loss": value * math.inf, "loss alone": value + math.inf, "gradient": steep(value)}
            return {**values, "loss": broken[kind]}

        monkeypatch.setattr(Objective, "forward", poisoned)

    return patch


@pytest.fixture
def after_each_step():
    """The weights after each step of any optimizer."""
    kept = []

    def keep(optimizer, *_):
        kept.append([value.detach().clone() for group in optimizer.param_groups for value in group["params"]])

    handle = register_optimizer_step_post_hook(keep)
    yield kept
    handle.remove()


def report(folder):
    return json.loads((folder.last / "adder_report.json").read_text())["training"]


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["images", "loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(kind, clip_grad, poison, train, after_each_step):
    """The second of two steps: weights, momentum and BatchNorm are those after the first, and so is the mean loss."""
    poison(kind, 1)
    rows, folder = train(clip_grad=clip_grad, hflip=0.0)
    assert len(after_each_step) == 1
    saved = adderkit.load(folder.last)
    sizes = sorted(value.sum().item() for value in after_each_step[0])
    assert sorted(value.sum().item() for value in saved.parameters()) == sizes
    assert saved.features[0][1].num_batches_tracked.item() == 1
    assert all(value.isfinite().all() for value in saved.state_dict().values())
    assert math.isfinite(rows[0]["train_loss"])
    assert report(folder)["skipped_steps"] == 1


def test_a_whole_accumulation_window_is_skipped(poison, train, after_each_step):
    poison("loss", 2)  # of 0 1 2 | 3
    _, folder = train(batch_size=16, grad_accum_steps=3)
    assert len(after_each_step) == 1
    assert report(folder)["skipped_steps"] == 1
    assert adderkit.load(folder.last).features[0][1].num_batches_tracked.item() == 1


def test_an_adder_network_goes_on_after_a_skipped_step(poison, train, adder_folder, after_each_step):
    poison("images", 1)
    rows, folder = train("distill", job=Job(ModelSource(str(adder_folder))), batch_size=16)
    assert len(after_each_step) == 3
    assert report(folder)["skipped_steps"] == 1
    assert math.isfinite(rows[0]["eval_loss"])


def test_too_many_in_a_row_end_the_run(poison, train, tmp_path):
    """The save of the epoch before stays: the run stops in the second epoch, after one good step in it."""
    poison("images", 3, 5, 6, 7)
    with pytest.raises(
        AdderkitError, match=r"not finite in the last 3 steps, up to epoch 1; .*last/.*lower --lr \(now 0.1\)"
    ):
        train(epochs=3, batch_size=16, skip_limit=3)
    saved = json.loads((tmp_path / "run" / "last" / "adder_report.json").read_text())
    assert saved["training"]["epoch"] == 0
    assert saved["training"]["skipped_steps"] == 1


def test_a_run_that_breaks_is_not_saved(train, tmp_path):
    """Weights of 1e30 after the first step; the limit is never reached, and the evaluation tells."""
    with pytest.raises(AdderkitError, match=r"in last/ of the run folder, if one was saved: .*\(now 1e\+30\)"):
        train(lr=1e30, warmup_epochs=0, batch_size=16)
    assert not (tmp_path / "run" / "last").exists()


def test_a_broken_save_within_an_epoch_is_left_out(poison, train, monkeypatch):
    saves = []
    monkeypatch.setattr(
        finetune, "_save_within_epoch", lambda run, job, folder, state: saves.append(state.batches_done)
    )
    poison("loss", 1)
    train(batch_size=16, save_every=1)
    assert saves == [1, 3]


@pytest.fixture
def scaled(monkeypatch):
    """``scaled(s)``: the next run scales its loss by s as on a GPU, which accelerate leaves out on the CPU.

    It computes in fp32 all the same: half precision is slow here.
    """
    make = finetune.make_accelerator

    def patch(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        def make_scaled(*args):
            accelerator = make(*args)
            accelerator.native_amp, accelerator.scaler = True, scaler
            accelerator.autocast_handler = AutocastKwargs(enabled=False)
            return accelerator

        monkeypatch.setattr(finetune, "make_accelerator", make_scaled)
        return scaler

    return patch


@pytest.mark.parametrize(
    ("kind", "scale", "clip_grad"), [("gradient", 512, 0.0), ("images", 512, 1.0), ("loss alone", 1024, 0.0)]
)
def test_fp16_lowers_the_scale_of_the_loss(kind, scale, clip_grad, scaled, poison, train, after_each_step):
    """The gradient to blame or not: of three steps the second is not taken."""
    scaler = scaled(1024.0)
    poison(kind, 1)
    _, folder = train(amp="fp16", clip_grad=clip_grad, train_images=96)
    assert scaler.get_scale() == scale
    assert report(folder)["skipped_steps"] == 1
    first, last = after_each_step
    assert all(value.isfinite().all() for value in last)
    assert any(not before.equal(after) for before, after in zip(first, last, strict=True))


def test_fp16_clips_what_is_unscaled(scaled, train, after_each_step):
    """Another scale makes the same steps; clipped while scaled, they would be a thousand times shorter."""
    for scale in (1.0, 1024.0):
        scaled(scale)
        train(folder=f"scale-{scale}", amp="fp16", clip_grad=1.0)
    before, expected, _, actual = (torch.cat([value.flatten() for value in step]) for step in after_each_step)
    assert (expected - before).norm() > 0.01
    torch.testing.assert_close(actual, expected)
