"""Runs that end before their time: one line with the reason and the way on, a save to go on from, the same end."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import active_children, get_all_start_methods
from pathlib import Path

import pytest

from adderkit.convert.errors import AdderkitError, RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.reproducible import EpochImages, EpochOrder
from adderkit.recipes.runs.folder import RunFolder, new_run_folder
from adderkit.recipes.training import epoch as steps
from adderkit.recipes.training import recovery as going_on
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.recovery import run_with_recovery

SCRIPT = Path(__file__).with_name("killed_once.py")


def ended(straight, kind, folder, match, **changes):
    """Run until it is stopped; the error's line names the way on."""
    with pytest.raises(AdderkitError, match=match) as caught:
        run_with_recovery(lambda: finetune.start(*straight.arguments(kind, **changes), folder), folder)
    line = str(caught.value)
    assert line.endswith(f"; continue with: adderkit finetune --resume {folder.path}")
    assert "\n" not in line


@pytest.fixture
def little_room():
    """From a call on, no file can grow beyond some bytes, whoever writes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("method", "room", "match"),
    [
        ("save_last", 100_000, r"last cannot be saved \(.*\); free some space, the save before is whole"),
        pytest.param("save_last", 600_000, r"last cannot be saved \(.*\); free some space", marks=pytest.mark.slow),
        ("save_best", 1_000, r"best cannot be saved \(.*File too large"),
        ("write_summary", 10, r"run cannot be written or read \(File too large\)"),
    ],
)
def test_a_disk_without_room(method, room, match, straight, same_run, tmp_path, monkeypatch, little_room):
    rows, through = straight("cnn")
    folder = RunFolder(tmp_path / "run")
    original, calls = getattr(RunFolder, method), []

    def crowded(self, *arguments):
        calls.append(None)
        if len(calls) == (1 if method == "save_best" else 2):
            little_room(room)
        original(self, *arguments)

    monkeypatch.setattr(RunFolder, method, crowded)
    ended(straight, "cnn", folder, match)
    monkeypatch.undo()
    little_room(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert not (folder.path / ".partial").exists()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


def test_a_loader_process_is_killed(straight, same_run, tmp_path, monkeypatch):
    rows, through = straight("cnn-workers")
    folder = RunFolder(tmp_path / "run")
    loss = steps._step

    def killing(run, position, *others):
        if position.epoch == 1:
            os.kill(active_children()[0].pid, signal.SIGKILL)
            time.sleep(5)  # torch notices at once
        return loss(run, position, *others)

    monkeypatch.setattr(steps, "_step", killing)
    ended(straight, "cnn-workers", folder, r"a loader process died.*killed by signal.*see --workers", epochs=3)
    monkeypatch.undo()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="signal handlers are not inherited")
def test_a_loader_process_survives_what_is_sent_to_the_whole_group(train, monkeypatch):
    """As a batch system does: the step that is being done still needs its images."""
    step, served = steps._step, []

    def terminating(run, position, *others):
        if not served:
            (loader,) = active_children()
            os.kill(loader.pid, signal.SIGTERM)
            loader.join(2)
            served.append(loader.is_alive())
        return step(run, position, *others)

    monkeypatch.setattr(steps, "_step", terminating)
    train(workers=1, batch_size=8)
    assert served == [True]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(workers, straight, same_run, tmp_path, monkeypatch):
    """In a window of three batches: what was done before it is saved, although no save is due."""
    changes = {"epochs": 1, "train_images": 128, "workers": workers}
    through, folder = (RunFolder(tmp_path / name) for name in ("through", "run"))
    finetune.start(*straight.arguments("cnn-accumulation", **changes), through)
    item, damaged = EpochImages.__getitem__, list(EpochOrder(128, seed=0))[5 * 16 + 3]

    def reading(self, index):
        if index == damaged:
            raise OSError("image file is truncated")
        return item(self, index)

    monkeypatch.setattr(EpochImages, "__getitem__", reading)
    match = r"an image cannot be had \(OSError: image file is truncated\); mend or remove it"
    ended(straight, "cnn-accumulation", folder, match, **changes)
    monkeypatch.undo()
    assert '"batches": 3' in (folder.last / "state" / "position.json").read_text()
    finetune.resume(folder)
    same_run(folder, through)


@pytest.mark.parametrize("stop", ["before-the-first-save", "after-an-epoch"])
def test_the_elastic_launcher_starts_a_run_again(stop, straight, same_run, tmp_path, stop_at, monkeypatch):
    rows, through = straight("adder")
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at("epoch 0/2" if stop == "before-the-first-save" else "epoch 1/2", 1)
        with pytest.raises(KeyboardInterrupt):
            finetune.start(*straight.arguments("adder"), folder)
        monkeypatch.undo()
        assert folder.last.exists() == (stop == "after-an-epoch")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with pytest.raises(RecipeError, match="holds a run already"):
            finetune.start(*straight.arguments("adder", lr=0.5), folder)  # somebody else's
        assert finetune.start(*straight.arguments("adder"), folder) == rows
    same_run(folder, through)


def test_a_run_from_drawn_weights_begins_with_them_again(straight, same_run, tmp_path, monkeypatch):
    """Killed before its first save."""
    folders = [RunFolder(tmp_path / name) for name in ("through", "killed")]
    arguments = straight.arguments("adder", adder_init="normal", epochs=1)
    finetune.start(*arguments, folders[0])
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_train", lambda *_: [])
        finetune.start(*arguments, folders[1])
    finetune.resume(folders[1])
    same_run(*folders)


def test_a_restart_needs_a_folder_with_a_name(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert new_run_folder("here", "net", Recipe()).path == Path("here")
    with pytest.raises(RecipeError, match="--output is not given, expected a folder with --max-restarts"):
        new_run_folder(None, "net", Recipe())


def test_other_errors_name_the_way_on_where_there_is_a_run(tmp_path):
    folder = RunFolder(tmp_path)

    def failing(error):
        def run():
            raise error

        return run

    with pytest.raises(ZeroDivisionError):
        run_with_recovery(failing(ZeroDivisionError("by zero")), folder)
    (tmp_path / "args.yaml").touch()
    with pytest.raises(AdderkitError, match=r"ZeroDivisionError: by zero \(unexpected; .*continue with: .*--resume"):
        run_with_recovery(failing(ZeroDivisionError("by zero")), folder)
    with pytest.raises(RecipeError, match=r"^no such thing$"):
        run_with_recovery(failing(RecipeError("no such thing")), folder)


def test_processes_beside_the_first_say_nothing_of_a_lost_one(tmp_path, monkeypatch):
    (tmp_path / "args.yaml").touch()

    def lost():
        raise RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]:4")

    with pytest.raises(AdderkitError, match=r"^another process of the run ended, and has said why; continue with"):
        run_with_recovery(lost, RunFolder(tmp_path))
    monkeypatch.setattr(going_on, "PartialState", lambda: type("State", (), {"is_main_process": False}))
    with pytest.raises(SystemExit):
        run_with_recovery(lost, RunFolder(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7])
def test_torchrun_restarts_a_killed_process(step, adder_folder, tmp_path):
    """Really killed, before the first save and after it; the end is that of a run which nothing stopped."""
    settings = ["train_images=128", "batch_size=16", "bn_images=32", "workers=0", "epochs=2", "save_every=2"]
    changes = [word for setting in settings for word in ("--set", setting)]
    words = ["finetune", adder_folder, "--dataset", "digits", *changes, "--output"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    summaries = []
    for killed in (0, step):
        folder = tmp_path / f"run-{killed}"
        command = [*launcher, SCRIPT, killed, *words, folder]
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert ("killed itself" in done.stderr) == bool(killed)
        summaries.append((folder / "summary.csv").read_text())
        shutil.rmtree(folder)
    assert summaries[0] == summaries[1]
