"""A run that was stopped, wherever and however, and resumed ends bit-equal to one that ran through."""

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from adderkit.convert.errors import RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.reproducible import EpochImages, EpochOrder
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.progress import ProgressBar
from adderkit.recipes.runs.signals import Interrupted, StopRequest
from adderkit.recipes.training import epoch as steps
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job

STOPS = {"first-epoch": ("epoch 0/2", 1), "second-epoch": ("epoch 1/2", 1), "evaluation": ("epoch 1 evaluation", 3)}
CASES = [
    ("cnn", "first-epoch", 0),
    ("cnn", "evaluation", 1),
    ("cnn-workers", "second-epoch", 1),
    ("adder", "second-epoch", 1),
    ("average-mixed", "second-epoch", 1),
]
MORE_CASES = [
    ("cnn", "second-epoch", 0),
    ("cnn-accumulation", "second-epoch", 1),
    ("adder", "second-epoch", 0),
    ("adder-adamw", "second-epoch", 1),
    ("average-mixed", "second-epoch", 0),
]
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "stop", "save_every"), [*CASES, *(pytest.param(*case, marks=SLOW) for case in MORE_CASES)], ids=str
)
def test_stopped_and_resumed_equals_run_through(
    kind, stop, save_every, straight, same_run, tmp_path, stop_at, monkeypatch
):
    """Saves within the epoch (``save_every=1``) are used, and leave no trace in what follows."""
    rows, through = straight(kind)
    folder = RunFolder(tmp_path / "run")
    stop_at(*STOPS[stop])
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*straight.arguments(kind, save_every=save_every), folder)
    monkeypatch.undo()
    torch.manual_seed(99)  # a new process knows nothing of the old one's random numbers
    done = []
    step = ProgressBar.step
    monkeypatch.setattr(
        ProgressBar, "step", lambda self, *args, **more: (done.append(self.title), step(self, *args, **more))
    )
    assert finetune.resume(folder) == rows
    same_run(folder, through)
    if save_every and kind == "cnn-workers":
        assert done.count("epoch 1/2") == 1  # of two: the other was done before the stop


@pytest.mark.parametrize("where", ["save_last", "write_summary"])
def test_stopped_while_saving(where, straight, same_run, tmp_path, monkeypatch):
    rows, through = straight("cnn")
    folder = RunFolder(tmp_path / "run")
    original = getattr(RunFolder, where)

    def interrupted(self, *args):
        done = args[0] if where == "write_summary" else args[2].rows
        if len(done) == 3:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(RunFolder, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*straight.arguments("cnn"), folder)
    monkeypatch.undo()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("cnn-accumulation", signal.SIGINT),
        ("adder", signal.SIGTERM),
        pytest.param("cnn-accumulation", signal.SIGTERM, marks=SLOW),
        pytest.param("adder", signal.SIGINT, marks=SLOW),
    ],
)
def test_a_signal_saves_and_stops(kind, number, straight, same_run, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, without ``save_every``; the summary is that of the run through."""
    rows, through = straight(kind)
    folder = RunFolder(tmp_path / "run")
    schedule = steps.scheduled_rate

    def signalling(run, epoch, batch):
        if not asked and epoch == 1:
            asked.append(os.kill(os.getpid(), number))
        return schedule(run, epoch, batch)

    asked = []
    monkeypatch.setattr(steps, "scheduled_rate", signalling)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted):
        finetune.start(*straight.arguments(kind), folder)
    monkeypatch.undo()
    assert signal.getsignal(number) == before
    assert "stopping after this step" in capsys.readouterr().err
    position = (folder.last / "state" / "run_state.json").read_text()
    assert '"epoch": 1' in position
    assert '"batches_done": 0' not in position
    assert finetune.resume(folder) == rows
    same_run(folder, through)


def test_a_second_interrupt_stops_at_once():
    class Alone:
        num_processes, is_main_process = 1, True

    with StopRequest(Alone()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="nothing is inherited")
def test_loader_processes_serve_on_after_one_signal_and_end_after_two(capfd):
    """They get what is sent to the whole group, and are silent."""

    class Alone:
        num_processes, is_main_process = 1, True

    def serve(number):
        os.kill(os.getpid(), number)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os._exit(3)

    with StopRequest(Alone()) as stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            child = multiprocessing.get_context("fork").Process(target=serve, args=(number,))
            child.start()
            child.join(30)
            assert child.exitcode == 3
        assert not stop.requested
    assert capfd.readouterr().err == ""


def test_a_damaged_save_costs_only_the_work_since_the_one_before(
    straight, same_run, tmp_path, stop_at, monkeypatch, capsys
):
    rows, through = straight("adder")
    folder = RunFolder(tmp_path / "run")
    stop_at("epoch 2/2", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*straight.arguments("adder"), folder)
    monkeypatch.undo()
    path = folder.last / "state" / "optimizer.bin"
    path.write_bytes(path.read_bytes()[:-100])
    assert finetune.resume(folder) == rows
    assert f"{folder.last} is damaged" in capsys.readouterr().err
    same_run(folder, through)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn-workers", "adder"])
def test_killed_again_and_again(kind, straight, same_run, tmp_path):
    """SIGKILL at times that nobody chose: in steps, saves, evaluations and starts. Every save is whole."""
    _, through = straight(kind)
    folder = RunFolder(tmp_path / "run")
    job, recipe = straight.arguments(kind, save_every=1)
    folder.start({"job": dataclasses.asdict(job), "recipe": recipe.to_dict(), "processes": 1})
    command = [sys.executable, "-m", "adderkit", "finetune", "--resume", str(folder.path)]
    kills = 0
    for attempt in range(60):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=2 + 0.37 * attempt)  # sooner than any machine is done
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors
        break
    assert kills
    same_run(folder, through)


@pytest.mark.parametrize("change", [{"job": None}, {"recipe": [1]}, {"job": {"model": "x"}}, {"recipe": {"lrr": 1}}])
def test_damaged_arguments_are_not_resumed(straight, tmp_path, change):
    _, folder = straight("cnn")
    copied = RunFolder(shutil.copytree(folder.path, tmp_path / "copy"))
    values = {**folder.arguments(), **change}
    (copied.path / "args.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"args.yaml is damaged|unknown recipe key"):
        finetune.resume(copied)


def test_relative_paths_are_good_from_another_directory(tmp_path, cnn_folder, adder_folder, image_folder, monkeypatch):
    """Model, teacher and data are named from one place; the run is resumed from another."""
    classes = [str(digit) for digit in range(10)]
    image_folder(classes=classes, count=2, size=(8, 8))
    shutil.copytree(adder_folder, tmp_path / "student")
    shutil.copytree(cnn_folder, tmp_path / "original")
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(
        dataset="folder", data_dir="images", distill_loss_weight=1.0, epochs=2, batch_size=4, workers=0, bn_images=8
    )
    job = Job(ModelSource("student"), teacher="original")

    def stopping(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_summary", stopping)
        with pytest.raises(KeyboardInterrupt):
            finetune.start(job, recipe, RunFolder("run"))
    shutil.rmtree(tmp_path / "original")  # the run has a copy of its teacher
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert len(finetune.resume(RunFolder(tmp_path / "run"))) == 2


def test_loader_processes_do_not_change_a_run(straight, same_run):
    """Augmentation follows from the image and the epoch, not from who drew before."""
    same_run(straight("cnn-workers")[1], straight("cnn")[1])


def test_augmentation_differs_between_epochs_and_images():
    images = EpochImages([None] * 3, seed=0)
    images.dataset = type(
        "Drawn", (), {"__getitem__": lambda self, index: (random.random(), torch.rand(1), np.random.rand())}
    )()

    def drawn(epoch, index):
        images.set_epoch(epoch)
        return [float(value) for value in images[index]]

    values = [drawn(epoch, index) for epoch in (0, 1) for index in (0, 1, 2)]
    assert len({value for triple in values for value in triple}) == 18
    assert drawn(0, 1) == values[1]


def test_order_is_a_permutation_of_its_own_in_each_epoch():
    order = EpochOrder(100, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[1]) == list(range(100)) != epochs[1]
    assert list(EpochOrder(100, seed=4)) != epochs[0]
