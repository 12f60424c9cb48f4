"""Several processes are one with the same batch: gradient, augmentation, statistics, saves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import adderkit
from adderkit.convert.errors import RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.distributed.connect import connect
from adderkit.recipes.terminal import errors as failure
from adderkit.recipes.verbs.evaluate import evaluate_model

SCRIPT = Path(__file__).with_name("two_processes.py")


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def run(*words, cwd=None):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def python(*words, cwd=None):
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, adder_folder, run_processes):
    """Folder of runs on one process, and on two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_chans": 1, "pretrained_cfg_overlay": {"input_size": (1, 16, 16)}}
    adderkit.save(timm.create_model("resnet10t", drop_path_rate=0.3, **arguments), two / "net")
    run_processes(SCRIPT, 1, adder_folder, one)
    run_processes(SCRIPT, 2, adder_folder, two)
    return one, two


def saved(folder):
    return load_file(folder / "last" / "model.safetensors")


def distance(folder, other):
    """Largest difference of a weight, relative to the largest weight of its layer."""
    ours, theirs = saved(folder), saved(other)
    return max(((value - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name, value in ours.items())


def losses(folder):
    rows = json.loads((folder / "last" / "state" / "run_state.json").read_text())["rows"]
    return [(row["train_loss"], row["eval_loss"], row["eval_top1"]) for row in rows]


def test_two_processes_are_one_with_the_same_batch(runs, adder_folder):
    one, two = runs
    assert distance(two / "step", one / "step") < 1e-6  # all in fp64, so that rounding stays small
    assert losses(two / "step")[0] == pytest.approx(losses(one / "step")[0], rel=1e-6)
    start = load_file(adder_folder / "model.safetensors")["features.4.conv1.adder"]
    assert (saved(one / "step")["features.4.conv1.adder"] - start).abs().max() > 0.05  # they have moved


def test_two_processes_are_one_with_synchronized_batchnorm(runs):
    """The very model, running statistics and moving average included; what is saved is a plain model."""
    one, two = (run / "synced" for run in runs)
    assert distance(two, one) < 2e-5
    average, expected = (load_file(run / "last" / "state" / "model_ema.safetensors") for run in (two, one))
    assert all((average[name] - value).abs().max() <= 2e-5 * value.abs().max() for name, value in expected.items())
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-5)


def test_clipping_made_a_difference_to_what_was_compared(runs):
    one, _ = runs
    assert distance(one / "unclipped", one / "synced") > 0.1


def test_accumulation_is_one_larger_batch(runs):
    one, _ = runs
    assert distance(one / "accumulated", one / "step") < 1e-6


def test_the_adaptive_rate_within_backward_is_another_step_on_two_processes(runs):
    """Where each process rescales its own part of the gradient, as published, two are not one."""
    one, two = runs
    assert distance(two / "backward", one / "backward") > 0.05


def test_killed_and_resumed_on_two_processes(runs):
    _, two = runs
    straight, resumed = saved(two / "step"), saved(two / "resumed")
    assert [name for name, value in straight.items() if not value.equal(resumed[name])] == []
    assert losses(two / "resumed") == losses(two / "step")


def test_stopped_in_the_last_step_of_an_epoch_on_two_processes(runs):
    """A CNN with drop path and checkpointed gradients: each process continues with its own running statistics."""
    _, two = runs
    straight, resumed = saved(two / "through"), saved(two / "stopped")
    assert [name for name, value in straight.items() if not value.equal(resumed[name])] == []
    assert losses(two / "stopped") == losses(two / "through")


def test_statistics_are_those_of_both_processes_when_evaluated_and_saved(runs):
    """Evaluated again by one process, the saved CNN has the loss that two recorded."""
    _, two = runs
    metrics = evaluate_model(ModelSource(str(two / "batchnorm" / "last")), "digits", None, "validation", 32, 0)
    _, loss, top1 = losses(two / "batchnorm")[0]
    assert metrics.top1 == pytest.approx(top1)
    assert metrics.loss == pytest.approx(loss, rel=1e-5)


def test_one_process_continues_what_two_began(runs, adder_folder, run_processes):
    """The same steps, of two accumulated batches."""
    _, two = runs
    run_processes(SCRIPT, 1, adder_folder, two, "continue")
    assert distance(two / "handed", two / "step") < 1e-6
    assert losses(two / "handed")[0] == pytest.approx(losses(two / "step")[0], rel=1e-6)
    arguments = yaml.safe_load((two / "handed" / "args.yaml").read_text())
    assert arguments["resumed"][0]["changes"] == {"grad_accum_steps": [1, 2], "processes": [2, 1]}


@pytest.mark.slow
def test_teacher_that_the_run_has_kept(adder_folder, cnn_folder, run_processes, tmp_path):
    """The resumed run is taught by the copy in its folder, which the second process does not see."""
    shutil.copytree(cnn_folder, tmp_path / "teacher")
    run_processes(SCRIPT, 2, adder_folder, tmp_path, "teacher")
    through, stopped = tmp_path / "0" / "through", tmp_path / "0" / "stopped"
    assert not (tmp_path / "teacher").exists()
    kept = (stopped / "teacher" / "model.safetensors").read_bytes()
    assert kept == (cnn_folder / "model.safetensors").read_bytes()
    assert (stopped / "last" / "model.safetensors").read_bytes() == (
        through / "last" / "model.safetensors"
    ).read_bytes()
    assert losses(stopped) == losses(through)
    assert len(losses(stopped)) == 2
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.parametrize(("process", "spoken"), [("0", "error: no"), ("3", "error: process 3: no")])
def test_the_first_process_speaks_at_once(process, spoken, monkeypatch, capsys):
    """The others wait, to be ended by the launcher where their error is the first's."""
    waited = []
    monkeypatch.setattr(failure, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("LOCAL_RANK", process)
    with pytest.raises(SystemExit):
        failure.fail("no")
    assert waited == ([] if process == "0" else [(20.0, "")])
    assert capsys.readouterr().err == f"{spoken}\n"


def test_an_error_of_all_is_told_once(tmp_path):
    command = ["-m", "adderkit", "finetune", "cifar_resnet20", "--no-pretrained", "--num-processes", "2"]
    done = run(*command, "--dataset", "folder", "--data-dir", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: --data-dir {tmp_path / 'none'} does not exist")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RecipeError, match="there are 2 processes on this machine, expected at most 1, the number of GPUs"
    ):
        connect()


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    """As srun starts them, without LOCAL_RANK: each would train by itself, all in one folder."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="WORLD_SIZE is 2, but accelerate finds 1 processes; start them with"):
        connect()


def test_the_command_line_starts_its_processes(adder_folder, tmp_path):
    """Once as a user would; the first of the processes speaks for both."""
    settings = ["train_images=64", "batch_size=16", "bn_images=32", "workers=0", "epochs=1"]
    changes = [word for setting in settings for word in ("--set", setting)]
    words = ["finetune", adder_folder, "--dataset", "digits", *changes, "--num-processes", "2", "--json"]
    printed = json.loads(python("-m", "adderkit", *words, cwd=tmp_path))
    assert len(printed["rows"]) == 1
    report = json.loads((tmp_path / printed["output"] / "last" / "adder_report.json").read_text())
    assert report["training"]["processes"] == 2
    assert report["training"]["batches"] == 2


def test_two_processes_without_a_shared_folder(run_processes, tmp_path):
    """Files of the main process reach processes that do not see them; what differs between processes is refused."""
    run_processes(Path(__file__).with_name("exchanging.py"), 2, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        "0/done", "0/run/last/model.bin", "0/run/last/state/run.json", "1/done",
    ]  # fmt: skip
