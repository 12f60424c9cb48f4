"""Runs that fail: one line with the reason and the command to resume, a save to resume from, the same end."""

import os
import resource
import signal
import time
from multiprocessing import active_children, get_all_start_methods

import pytest

from adderkit.convert.errors import AdderkitError, RecipeError
from adderkit.recipes.data.reproducible import EpochImages, EpochOrder
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.training import epoch as steps
from adderkit.recipes.training import recovery as going_on
from adderkit.recipes.training import run as finetune
from adderkit.recipes.training.recovery import run_with_recovery


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
        ("save_last", 100_000, r"cannot save .*last \(.*\); free some space, the save before is intact"),
        pytest.param("save_last", 600_000, r"cannot save .*last \(.*\); free some space", marks=pytest.mark.slow),
        ("save_best", 1_000, r"cannot save .*best \(.*File too large"),
        ("write_summary", 10, r"cannot read or write .*run \(File too large\)"),
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
    loss, others_children = steps._step, active_children()

    def killing(run, position, *others):
        if position.epoch == 1:
            (loader,) = set(active_children()) - set(others_children)
            os.kill(loader.pid, signal.SIGKILL)
            time.sleep(5)  # torch notices at once
        return loss(run, position, *others)

    monkeypatch.setattr(steps, "_step", killing)
    ended(straight, "cnn-workers", folder, r"a loader process died.*killed by signal.*lower --workers", epochs=3)
    monkeypatch.undo()
    assert finetune.resume(folder) == rows
    same_run(folder, through)


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="signal handlers are not inherited")
def test_a_loader_process_survives_what_is_sent_to_the_whole_group(train, monkeypatch):
    """As a batch system does: the step that is being done still needs its images."""
    step, served, others_children = steps._step, [], active_children()

    def terminating(run, position, *others):
        if not served:
            (loader,) = set(active_children()) - set(others_children)
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
    match = r"cannot load an image \(OSError: image file is truncated\); repair or remove it"
    ended(straight, "cnn-accumulation", folder, match, **changes)
    monkeypatch.undo()
    assert '"batches_done": 3' in (folder.last / "state" / "run_state.json").read_text()
    finetune.resume(folder)
    same_run(folder, through)


def test_a_command_that_is_repeated_names_the_way_to_resume(straight, same_run, tmp_path, stop_at, monkeypatch):
    """As by a launcher with restarts; what was saved is not touched."""
    rows, through = straight("cnn")
    folder = RunFolder(tmp_path / "run")
    stop_at("epoch 1/2", 1)
    with pytest.raises(KeyboardInterrupt):
        finetune.start(*straight.arguments("cnn"), folder)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=f"holds a run already; continue it with --resume {folder.path}"):
        finetune.start(*straight.arguments("cnn"), folder)
    assert finetune.resume(folder) == rows
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

    with pytest.raises(AdderkitError, match=r"^another process of the run has ended; continue with"):
        run_with_recovery(lost, RunFolder(tmp_path))
    monkeypatch.setattr(going_on, "PartialState", lambda: type("State", (), {"is_main_process": False}))
    with pytest.raises(SystemExit):
        run_with_recovery(lost, RunFolder(tmp_path))
