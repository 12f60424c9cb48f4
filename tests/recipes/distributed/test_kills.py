"""A run of two processes that is killed again and again, in every way, ends bit-equal to one that nothing stopped."""

import runpy
from pathlib import Path

import pytest

TRIAL = runpy.run_path(str(Path(__file__).with_name("kill_trial.py")))


@pytest.mark.slow
def test_killed_and_begun_again(tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    assert TRIAL["begin"](straight).wait(600) == 0
    assert TRIAL["trial"](folder, 6, 0) == []
    assert TRIAL["differences"](folder, straight) == []
