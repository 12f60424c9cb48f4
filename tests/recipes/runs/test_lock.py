"""One command at a time trains in a run folder."""

import os
import subprocess
import sys

import pytest

from adderkit.convert.errors import RecipeError
from adderkit.recipes.runs import lock
from adderkit.recipes.runs.lock import folder_lock

HOLDER = """
import sys
from pathlib import Path
from adderkit.recipes.runs.lock import folder_lock
with folder_lock(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path`` until its standard input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], text=True, **pipes)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_command_names_the_first(holder, tmp_path):
    said = []
    with (
        pytest.raises(
            RecipeError, match=rf"{tmp_path} is in use: process {holder.pid} on .* is training in it; wait for it"
        ),
        folder_lock(tmp_path, said.append, patience=0.0),
    ):
        pass
    assert said == []


def test_a_second_command_waits_for_the_first_to_end(holder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (holder.kill(), holder.wait()))
    with folder_lock(tmp_path, said.append):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    (line,) = said
    assert line.startswith(f"waiting for process {holder.pid} on ")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(38, "Function not implemented")

    said = []
    monkeypatch.setattr(lock.fcntl, "lockf", missing)
    with folder_lock(tmp_path, said.append):
        assert said == [
            f"cannot lock {tmp_path} (Function not implemented): make sure that no other command is training in it"
        ]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RecipeError, match=f"cannot write to {tmp_path / 'file'}: "),
        folder_lock(tmp_path / "file", print),
    ):
        pass
