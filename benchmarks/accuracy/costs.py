"""Time of commands that may run for hours and be interrupted and resumed: their seconds are added up in a file."""

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

from adderkit.convert.files import write_json

# At most this many seconds are lost when the process is killed.
SAVE_INTERVAL = 10


def cost(target: Path) -> dict[str, float]:
    """Return the wall-clock and CPU seconds that a file holds; 0 if it does not exist."""
    known = {"seconds": 0.0, "cpu_seconds": 0.0}
    return {**known, **json.loads(target.read_text())} if target.exists() else known


def timed(folder: Path, command: list[str], target: Path) -> None:
    """Run an adderkit command in a folder, and add its time to a file, which is updated while it runs.

    CPU time includes all threads and the ended child processes of the command. Unlike wall-clock time, it is hardly
    affected by other work on the machine.

    Raises:
        subprocess.CalledProcessError: If the command fails.
        KeyboardInterrupt: If this process is interrupted; the command is then terminated first.
    """
    before, started, used = cost(target), time.perf_counter(), _ended_children()

    def save(cpu: float) -> None:
        now = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}
        write_json(target, {key: round(before[key] + value, 1) for key, value in now.items()})

    print("$ adderkit", *command, file=sys.stderr, flush=True)
    child = subprocess.Popen([sys.executable, "-m", "adderkit", *command], cwd=folder, stdout=subprocess.DEVNULL)
    try:
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):  # the process may have ended in the meantime
                save(sum(psutil.Process(child.pid).cpu_times()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(SAVE_INTERVAL)
    finally:
        child.terminate()
        child.wait()
        save(_ended_children() - used)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)


def _ended_children() -> float:
    """Return the CPU seconds of this process's ended children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
