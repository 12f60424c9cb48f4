"""Progress goes to standard error, as lines where there is no terminal."""

import re
from functools import partial

import pytest

from adderkit.recipes.runs import progress
from adderkit.recipes.runs.progress import ProgressBar, calibration_progress
from adderkit.recipes.training.epoch import _seconds_after


def lines(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def steps(title, total, **options):
    with ProgressBar(title, total, **options) as bar:
        for index in range(total):
            bar.step(lambda index=index: f"loss {index}")


def test_only_the_last_step_by_default(capsys):
    steps("epoch 0/1", 5)
    (line,) = lines(capsys)
    assert re.fullmatch(r"epoch 0/1 \[5/5 \(100%\)\] \d+\.\ds loss 4", line)


def test_a_line_every_so_many_steps(capsys):
    steps("epoch", 7, log_interval=3)
    assert [re.search(r"\[(\d)/7 \((\d+)%\)\]", line).groups() for line in lines(capsys)] == [
        ("3", "42"), ("6", "85"), ("7", "100"),
    ]  # fmt: skip


def test_a_line_every_half_minute_of_a_slow_task(capsys, monkeypatch):
    """Of 12 steps of 8 seconds, the fourth and the eighth are the first after 30 and after 60 seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with ProgressBar("fitting layers", 12) as bar:
        for _ in range(12):
            now[0] += 8.0
            bar.step(lambda: "conv")
    assert lines(capsys) == [
        "fitting layers [4/12 (33%)] 32.0s eta 0:01:04 conv",
        "fitting layers [8/12 (66%)] 64.0s eta 0:00:32 conv",
        "fitting layers [12/12 (100%)] 96.0s conv",
    ]


def test_time_left_of_epoch_and_run(capsys, monkeypatch):
    """Two seconds a step, resumed after 90 of 100; two more epochs, each followed by 100 seconds of evaluation."""
    monkeypatch.setattr(progress.time, "perf_counter", lambda: 0.0)
    rest = partial(_seconds_after, 2, 100, 100.0)
    with ProgressBar("epoch 7/9", 100, log_interval=91, rest=rest) as bar:
        monkeypatch.setattr(progress.time, "perf_counter", lambda: 2.0)
        bar.step(lambda: "loss 1", done=91)
    (line,) = lines(capsys)
    # 9 steps are left of this epoch, then 200 steps and three evaluations.
    assert line == "epoch 7/9 [91/100 (91%)] 2.0s eta 0:00:18, run 0:11:58 loss 1"


def test_silent_on_other_processes(capsys):
    steps("epoch", 5, enabled=False, log_interval=1)
    assert lines(capsys) == []


def test_status_is_asked_for_only_when_it_is_shown(capsys):
    asked = []
    with ProgressBar("epoch", 100, log_interval=50) as bar:
        for _ in range(100):
            bar.step(lambda: asked.append(1) or "")
    assert len(asked) == len(lines(capsys)) == 2


def test_a_long_line_is_not_broken(capsys):
    steps("a very long title " * 20, 1)
    assert len(lines(capsys)) == 1


@pytest.mark.parametrize("text", ["[bold]loss[/bold]", "a[1]"])
def test_brackets_are_kept(capsys, text):
    steps(text, 1)
    assert lines(capsys)[0].startswith(text)


def test_a_stream_of_unknown_length(capsys):
    with ProgressBar("stream", 0, log_interval=2) as bar:
        for _ in range(4):
            bar.step()
    assert len(lines(capsys)) == 2


def test_calibration_shows_one_piece_of_work_and_a_later_joint_fit_another(capsys):
    with calibration_progress() as progress:
        for what, done in (("layers", 0), ("conv1", 0), ("conv2", 400), ("all layers", 900), ("statistics", 1000)):
            progress(what, done, 1000)
        for step in range(5):
            progress("all layers", step, 4)
    first, second = lines(capsys)
    assert first.startswith("calibrating [1000/1000 (100%)]")
    assert second.startswith("fitting all layers together [4/4 (100%)]")


def test_time_left_of_a_resumed_calibration_follows_from_what_it_did_itself(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with calibration_progress() as report:
        report("conv3", 600, 1000)
        now[0] = 50.0
        report("conv4", 800, 1000)  # 200 in 50 s
        now[0] = 100.0
        report("statistics", 1000, 1000)
    assert lines(capsys)[0] == "calibrating [800/1000 (80%)] 50.0s eta 0:00:50 conv4"


def test_calibration_that_fails_is_closed():
    with pytest.raises(RuntimeError, match="stop"), calibration_progress() as progress:  # noqa: PT012
        progress("conv1", 1, 2)
        raise RuntimeError("stop")
    assert progress._bar is None
