"""``log.txt``: what was planned, what happened, how it ended; and what a run writes beside its models."""

import re
import shutil

import pytest

from adderkit.convert.errors import AdderkitError
from adderkit.recipes.runs import journal
from adderkit.recipes.runs.folder import RunFolder
from adderkit.recipes.runs.progress import ProgressBar
from adderkit.recipes.training import run as finetune

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def lines(folder):
    text = (folder.path / "log.txt").read_text()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert re.match(TIME, line), line
    return [re.sub(TIME, "", line) for line in text.splitlines()]


def test_a_run_from_begin_to_end(train):
    _, folder = train(epochs=2, log_interval=1)
    found = lines(folder)
    assert re.fullmatch(r"adderkit \S+, torch \S+, timm \S+, accelerate \S+ on 1 x cpu", found[0])
    assert found[1].startswith("model: cifar_resnet20: ")
    assert sum(line.startswith("epoch 0/1 [") for line in found) == 2
    assert sum(line.startswith("epoch 1 evaluation [12/12") for line in found) == 1
    assert {path.name for path in (folder.path / "plots").iterdir()} == {
        "loss.png", "accuracy.png", "learning_rate.png", "weight_scale.png", "gradient_scale.png"
    }  # fmt: skip


def test_resuming_goes_on_in_the_same_log_behind_a_line_that_was_cut_off(train, tmp_path, stop_at, monkeypatch):
    stop_at("epoch 1/1", 1)
    with pytest.raises(KeyboardInterrupt):
        train(epochs=2)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert lines(folder)[-1].startswith("ended by KeyboardInterrupt")
    log = folder.path / "log.txt"
    before = log.read_text() + "2026-01-01 00:00:00 epoch 1/1 [1"
    log.write_text(before)
    finetune.resume(folder)
    assert log.read_text().startswith(before + "\n")
    assert "resumed after step 2" in lines(folder)


def test_skipped_steps_and_the_error_that_ends_a_run(train, tmp_path):
    with pytest.raises(AdderkitError, match="not finite"):
        train(lr=1e30, skip_limit=2, epochs=3, warmup_epochs=0)
    found = lines(RunFolder(tmp_path / "run"))
    assert any(
        re.fullmatch(r"step \d+ skipped, loss or gradient is not finite; 1 skipped in all", line) for line in found
    )
    assert found[-1].startswith("ended by AdderkitError: loss or gradient was not finite in the last 2 steps")


def test_pictures_are_drawn_again_when_a_minute_has_passed(train, monkeypatch):
    drawn = []
    monkeypatch.setattr(journal, "draw_plots", lambda rows, *rest: drawn.append(len(rows)))
    train(folder="quick", epochs=3)
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_PLOTS", 0.0)
    train(folder="slow", epochs=3)
    assert drawn == [3, 1, 2, 3]


def test_tables_that_a_kill_prevented_are_made_up_for(train, tmp_path):
    _, folder = train(epochs=2)
    copied = RunFolder(shutil.copytree(folder.path, tmp_path / "copy"))
    for name in ("summary.csv", "layers.csv"):
        (copied.path / name).unlink()
    shutil.rmtree(copied.path / "plots")
    finetune.resume(copied)
    for name in ("summary.csv", "layers.csv", "plots/loss.png"):
        assert (copied.path / name).read_bytes() == (folder.path / name).read_bytes()


def test_a_log_that_cannot_be_written_does_not_end_the_run(train, monkeypatch, capsys):
    monkeypatch.setattr(journal, "_open_log", lambda path: open("/dev/full", "w"))  # noqa: SIM115
    rows, _ = train(epochs=1)
    assert len(rows) == 1
    assert "cannot write to /dev/full any more: No space left on device" in capsys.readouterr().err


class Terminal:
    """Says that there is a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return (lambda: True) if name == "isatty" else getattr(self.stream, name)


def test_a_bar_on_a_terminal_and_the_lines_in_the_log_all_the_same(monkeypatch, capsys):
    import sys

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    noted = []
    with ProgressBar("epoch 0/1", 4, log_interval=2, note=noted.append) as bar:
        assert bar.live
        for _ in range(4):
            bar.step(lambda: "loss 1")
    shown = capsys.readouterr().err
    assert "━" in shown
    assert "(50%)" not in shown
    assert [re.sub(r"\d\.\ds", "s", line) for line in noted] == [
        "epoch 0/1 [2/4 (50%)] s loss 1", "epoch 0/1 [4/4 (100%)] s loss 1"
    ]  # fmt: skip
