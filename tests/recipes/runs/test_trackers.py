"""Trackers: names are checked, numbers arrive, and a resumed run continues the same log."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from adderkit.convert.errors import RecipeError
from adderkit.convert.model_source import ModelSource
from adderkit.recipes.runs import trackers
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.trackers import start_trackers, tracker_names
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.models import Job


@pytest.fixture
def recording():
    """A tracker called ``recording``; what became of its instances, in order."""
    events = []

    class Recording(GeneralTracker):
        name, requires_logging_directory = "recording", False

        def __init__(self, project, **options):
            super().__init__(_blank=True)
            events.append(("project", project, options))
            print("begun")

        @property
        def tracker(self):
            return self

        def start(self):
            pass

        def store_init_configuration(self, values):
            events.append(("settings", values))

        def log(self, values, step=None, **more):
            events.append(("numbers", step, values))

        def finish(self):
            events.append(("end",))
            print("ended")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOGGER_TYPE_TO_CLASS, "recording", Recording)
        yield events


def numbers(events, prefix):
    return {step: values for kind, step, values in (event for event in events if event[0] == "numbers")
            if any(key.startswith(prefix) for key in values)}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "names"),
    [("", []), (" , ", []), ("tensorboard", ["tensorboard"]), ("recording, tensorboard,recording",
                                                                ["recording", "tensorboard"])],
)  # fmt: skip
def test_names(recording, text, names):
    assert tracker_names(text) == names


def test_an_unknown_name():
    with pytest.raises(RecipeError, match=r"log_with names 'tensorbored', expected one or several of .*tensorboard"):
        tracker_names("tensorbored")


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(RecipeError, match=r"log_with names wandb, .* not installed: pip install wandb"):
        tracker_names("wandb")


def test_a_run_is_refused_before_its_folder_is_made(train, tmp_path):
    with pytest.raises(RecipeError, match="log_with names 'nothing'"):
        train(log_with="nothing")
    assert not (tmp_path / "run").exists()


def test_what_is_logged(recording, train, capsys):
    rows, _ = train(epochs=2, train_images=96, log_with="recording", log_interval=2, data_dir="/secret/place")
    assert recording[0] == ("project", "adderkit", {})
    settings = recording[1][1]
    assert (settings["model"], settings["lr"], settings["img_size"]) == ("cifar_resnet20", 0.1, "")
    assert "secret" not in str(recording)
    assert recording[-1] == ("end",)
    printed = capsys.readouterr()
    assert printed.out == ""  # what a tracker prints is no result
    assert printed.err.count("begun") == printed.err.count("ended") == 1
    steps = numbers(recording, "train/")
    assert list(steps) == [2, 4, 6]
    assert all(set(values) == {"train/loss", "train/lr", "train/images_per_second", "train/skipped_steps"}
               for values in steps.values())  # fmt: skip
    epochs = numbers(recording, "epoch/")
    assert list(epochs) == [3, 6]
    for row, values in zip(rows, epochs.values(), strict=True):
        assert {key: values[f"epoch/{key}"] for key in row} == row
    assert sum(key.startswith("weight_rms/") for key in epochs[3]) == 22
    assert sum(key.startswith("gradient_norm/") for key in epochs[3]) == 22
    assert len({event[0] for event in recording}) == 4


def test_each_term_of_the_loss_is_logged(recording, train, adder_folder):
    """They add up: at the last step of the epoch, and over the epoch."""
    settings = {"train_images": 96, "log_with": "recording", "log_interval": 1}
    rows, folder = train("distill", job=Job(ModelSource(str(adder_folder))), task_loss_weight=0.5, **settings)
    names = ("task", "distill", "block")
    assert list(rows[0])[6:] == [f"train_{name}" for name in names]
    assert (
        (folder.path / "summary.csv").read_text().splitlines()[0].endswith(",lr,train_task,train_distill,train_block")
    )
    for values in numbers(recording, "train/").values():
        total = sum(weight * values[f"train/{name}"] for weight, name in zip((0.5, 1, 1), names, strict=True))
        assert values["train/loss"] == pytest.approx(total, rel=1e-5)
    last = list(numbers(recording, "train/").values())[-1]
    assert {f"train_{name}": last[f"train/{name}"] for name in ("loss", *names)}.items() <= rows[0].items()
    pattern = r" images/s loss \S+ task \S+ distill \S+ block \S+ lr "
    assert len(re.findall(pattern, (folder.path / "log.txt").read_text())) == 3


def test_a_resumed_run_logs_what_one_that_ran_through_does(recording, train, tmp_path, stop_at, monkeypatch):
    settings = {"epochs": 2, "train_images": 96, "log_with": "recording", "log_interval": 1, "save_every": 1}
    train(folder="through", **settings)
    expected = numbers(recording, "epoch/")
    recording.clear()
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        train(folder="stopped", **settings)
    assert recording[-1] == ("end",)
    monkeypatch.undo()
    begun = len(recording)
    finetune.resume(RunFolder(tmp_path / "stopped"))
    assert recording[begun][0] == "project"
    assert "settings" not in {event[0] for event in recording[begun:]}
    assert list(numbers(recording[begun:], "train/")) == [6]
    assert numbers(recording, "epoch/") == expected


def test_options_name_the_run_and_where_it_goes_on(monkeypatch, tmp_path, quick_recipe):
    given = {}
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = ["wandb"]
    monkeypatch.setattr(accelerator, "init_trackers", lambda *words: given.update(zip("pco", words, strict=True)))
    arguments = {"id": "abc", "job": {"source": {"name": "net"}}}
    start_trackers(accelerator, quick_recipe(), tmp_path / "mine", arguments, 0)
    assert given["c"]["model"] == "net"
    wandb = {"name": "mine", "id": "abc", "resume": "allow", "dir": str(tmp_path / "mine")}
    assert given["o"]["wandb"] == {**wandb, "settings": {"x_disable_meta": True}}
    assert given["o"]["tensorboard"] == {"purge_step": None}
    start_trackers(accelerator, quick_recipe(), tmp_path / "mine", arguments, 12)
    assert given["c"] is None
    assert given["o"]["tensorboard"] == {"purge_step": 13}


def test_tensorboard_goes_on_in_the_same_log(train, tmp_path, stop_at, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"epochs": 3, "train_images": 96, "log_with": "tensorboard", "log_interval": 1}
    stop_at("epoch 2/2", 2)
    with pytest.raises(KeyboardInterrupt):
        train(**settings)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    rows = finetune.resume(folder)
    log = events.EventAccumulator(str(folder.path / "trackers" / "adderkit")).Reload()
    found = {event.step: event.value for event in log.Scalars("epoch/train_loss")}
    assert found == {3 * (row["epoch"] + 1): pytest.approx(row["train_loss"], rel=1e-6) for row in rows}
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 10))
    assert "weight_rms/features.0.0" in log.Tags()["scalars"]


def test_wandb_makes_one_log_without_secrets(train, tmp_path, monkeypatch):
    """Offline, with the command line that Weights & Biases would have noted."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_API_KEY": "hidden-key" * 4}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["adderkit", "--data-dir", "s3://user:hidden-word@place"])
    train(log_with="wandb", data_dir="s3://user:hidden-word@place")
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    written = b"".join(path.read_bytes() for path in log.rglob("*") if path.is_file())
    assert b"eval_top1" in written
    assert b"hidden" not in written


def test_trackio_keeps_the_numbers(tmp_path):
    """In a process of its own, since trackio reads where its files go when it is imported."""
    pytest.importorskip("trackio")
    words = ["finetune", "cifar_resnet20", "--no-pretrained", "--dataset", "digits", "--epochs", "1", "--json"]
    words += ["--set", "train_images=64", "--set", "batch_size=32", "--set", "log_interval=1", "--workers", "0"]
    words += ["--set", "log_with=trackio", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [sys.executable, "-m", "adderkit", *words], env=environment, check=True, capture_output=True, text=True
    )
    (row,) = json.loads(done.stdout)["rows"]
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "adderkit.db")) as database:
        logged = [(step, json.loads(values)) for step, values in database.execute("SELECT step, metrics FROM metrics")]
    assert [step for step, values in logged if "train/loss" in values] == [1, 2]
    (epoch,) = [values for _, values in logged if "epoch/epoch" in values]
    assert epoch["epoch/eval_top1"] == row["eval_top1"]
