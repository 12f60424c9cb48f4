"""The accuracy table: what is finished makes a row, seeds are put together, and costs add up over stops."""

import json
import subprocess

import pytest

from benchmarks.accuracy import fashion_mnist_table as accuracy
from benchmarks.accuracy.costs import cost, timed


def finished(runs, name, top1, cpu_seconds):
    folder = runs / name
    folder.mkdir()
    lines = ["epoch,eval_top1", *(f"{epoch},{value}" for epoch, value in enumerate(top1))]
    (folder / "summary.csv").write_text("\n".join(lines))
    (runs / f"{name}.cost.json").write_text(json.dumps({"seconds": 2 * cpu_seconds, "cpu_seconds": cpu_seconds}))


@pytest.fixture
def runs(tmp_path):
    """A teacher, two seeds of one way from a calibrated start, and a run that was cut off."""
    (tmp_path / "calibrated.evaluation.json").write_text('{"top1": 90.0}')
    (tmp_path / "calibrated.cost.json").write_text('{"seconds": 9, "cpu_seconds": 60}')
    finished(tmp_path, "teacher-seed0", [80.0] * 5 + [93.0], 600)
    finished(tmp_path, "distill-1-seed0", [91.0], 120)
    finished(tmp_path, "distill-1-seed1", [92.0], 180)
    finished(tmp_path, "distill-3-seed0", [91.0, 91.5], 200)
    return tmp_path


def test_only_what_is_finished_is_a_row_and_its_curve_begins_with_its_start(runs):
    found = [(row["row"], row["seed"], row["curve"], row["best"]) for row in accuracy.rows(runs)]
    assert found == [
        ("teacher", 0, [80.0] * 5 + [93.0], 93.0),
        ("calibrated", 0, [90.0], 90.0),
        ("distill-1", 0, [90.0, 91.0], 91.0),
        ("distill-1", 1, [90.0, 92.0], 92.0),
    ]


def test_seeds_share_a_line_and_the_start_counts(runs):
    lines = accuracy.table(accuracy.rows(runs)).splitlines()
    assert "| CNN teacher | 6 | 0 | 93.00 | 10.0 |" in lines
    assert "| calibrated, not trained | 0 | 0 | 90.00 | 1.0 |" in lines
    assert "| calibrated, distilled | 1 | 0, 1 | 91.50 (91.00 to 92.00) | 3.5 |" in lines
    assert len(lines) == 5


def test_a_run_that_was_not_timed_has_no_minutes(runs):
    (runs / "teacher-seed0.cost.json").unlink()
    assert "| CNN teacher | 6 | 0 | 93.00 |  |" in accuracy.table(accuracy.rows(runs)).splitlines()


def test_a_picture_of_what_there_is(runs):
    accuracy.draw(accuracy.rows(runs), runs / "accuracy.png")
    assert (runs / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_costs_add_up_also_of_a_command_that_fails(tmp_path):
    target = tmp_path / "it.cost.json"
    assert cost(target) == {"seconds": 0.0, "cpu_seconds": 0.0}
    timed(tmp_path, ["recipes", "ls"], target)
    once = cost(target)
    assert once["cpu_seconds"] > 0
    with pytest.raises(subprocess.CalledProcessError):
        timed(tmp_path, ["recipes", "show", "nothing"], target)
    twice = cost(target)
    assert twice["cpu_seconds"] > once["cpu_seconds"]
    assert twice["seconds"] > once["seconds"]
