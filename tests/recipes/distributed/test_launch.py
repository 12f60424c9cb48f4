"""Processes that begin together end together, with one line that names the cause."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from adderkit.recipes.distributed import launch, worker
from adderkit.recipes.distributed.launch import without_option

# What each of the processes does, which know their ranks and write messages as finetune does.
PREAMBLE = """
import os, signal, sys, time
from adderkit.recipes.distributed.worker import follow_launcher, tell_launcher
rank = int(os.environ["RANK"])
"""


@pytest.fixture(autouse=True)
def same_handlers():
    """The launcher keeps its handlers until its process ends; here it does not end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(monkeypatch, capfd, script, processes=2, patience=0.3):
    """Run a script in processes; the exit status and what was printed."""
    monkeypatch.setattr(launch, "_PATIENCE", patience)
    popen = subprocess.Popen
    command = [sys.executable, "-c", PREAMBLE + script]
    monkeypatch.setattr(launch.subprocess, "Popen", lambda _, **options: popen(command, **options))
    status = launch.launch(["finetune"], processes)
    return status, capfd.readouterr().err


def test_success_is_silent(monkeypatch, capfd):
    script = 'assert os.environ["WORLD_SIZE"] == "3" and os.environ["LOCAL_RANK"] == os.environ["RANK"]'
    assert ended(monkeypatch, capfd, script, processes=3) == (0, "")


def test_an_error_of_all_is_one_line(monkeypatch, capfd):
    script = 'tell_launcher(error="no such folder"); sys.exit(1)'
    assert ended(monkeypatch, capfd, script) == (1, "error: no such folder\n")


def test_the_error_of_one_ends_all(monkeypatch, capfd):
    """The other would wait for ever, and says in vain that it has lost somebody."""
    script = """
if rank == 1:
    tell_launcher(error="cannot load an image")
    sys.exit(1)
tell_launcher(error="another process of the run has ended")
time.sleep(600)
"""
    assert ended(monkeypatch, capfd, script) == (1, "error: process 1: cannot load an image\n")


def test_what_a_process_says_that_lost_another_is_not_the_cause(monkeypatch, capfd):
    """Although it ends first."""
    script = """
if rank == 0:
    tell_launcher(error="another process of the run has ended; continue with: x")
    sys.exit(1)
time.sleep(0.3)
tell_launcher(error="cannot load an image; continue with: x")
sys.exit(1)
"""
    line = "error: process 1: cannot load an image; continue with: x\n"
    assert ended(monkeypatch, capfd, script, patience=20.0) == (1, line)


def test_a_killed_process_is_named_with_the_way_on(monkeypatch, capfd):
    script = """
tell_launcher(resume="adderkit finetune --resume x") if rank == 0 else time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(600)
"""
    line = "error: process 0 was killed by SIGKILL; continue with: adderkit finetune --resume x\n"
    assert ended(monkeypatch, capfd, script) == (1, line)


def test_a_signal_lets_the_processes_finish(monkeypatch, capfd):
    """They take longer than they would be given after a failure."""
    script = """
signal.signal(signal.SIGTERM, lambda *_: None)
time.sleep(0.7 if rank == 0 else 0)  # the other is ready, too
os.kill(os.getppid(), signal.SIGINT) if rank == 0 else signal.pause()
time.sleep(1)
tell_launcher(error="interrupted; continue with: x") if rank == 0 else None
sys.exit(1)
"""
    assert ended(monkeypatch, capfd, script) == (1, "error: interrupted; continue with: x\n")


def test_a_second_ctrl_c_kills(monkeypatch, capfd):
    script = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
tell_launcher(resume="x") if rank == 0 else time.sleep(0.5)
os.kill(os.getppid(), signal.SIGINT) if rank == 0 else None
while True: time.sleep(600)
"""
    assert ended(monkeypatch, capfd, script) == (1, "error: interrupted; continue with: x\n")


@pytest.mark.parametrize("own", [False, True])
def test_a_process_ends_with_its_launcher(own, tmp_path):
    """Whether adderkit's own or another, which is killed and cannot end it."""
    script = f"{PREAMBLE}\nfollow_launcher(); print(os.getpid(), flush=True); time.sleep(600)"
    launcher = f"""
import os, subprocess, sys
own = {{"ADDERKIT_LAUNCHER": f"{{os.getpid()}}:9"}} if {own} else {{}}
subprocess.run([sys.executable, "-c", {script!r}], env={{**os.environ, "RANK": "0", "LOCAL_RANK": "0", **own}})
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        assert child.is_running()
        assert psutil.wait_procs([child], timeout=30)[1] == []


def test_without_a_launcher_nobody_is_told(monkeypatch):
    monkeypatch.delenv(worker.LAUNCHER, raising=False)
    assert not worker.tell_launcher(error="x")
    reading, writing = os.pipe()
    monkeypatch.setenv(worker.LAUNCHER, f"1:{writing}")
    monkeypatch.setenv("RANK", "3")
    assert worker.tell_launcher(error="x")
    assert json.loads(os.read(reading, 100)) == {"rank": "3", "error": "x"}
    os.close(reading)
    assert not worker.tell_launcher(error="x")  # it was killed
    os.close(writing)


@pytest.mark.parametrize("words", [["--num-processes", "2"], ["--num-processes=2"]])
def test_the_option_is_left_out_for_the_processes(words):
    assert without_option(["finetune", *words, "net", "--epochs", "2"]) == ["finetune", "net", "--epochs", "2"]


@pytest.mark.parametrize(("text", "processes"), [("processes: 4\n", 4), ("processes: many\n", 1), (None, 1)])
def test_a_resumed_run_has_its_number_of_processes(tmp_path, text, processes):
    if text:
        (tmp_path / "args.yaml").write_text(text)
    assert launch.processes_of_run(str(tmp_path)) == processes
