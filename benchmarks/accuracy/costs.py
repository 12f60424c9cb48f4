"""What commands cost that may take hours, be cut off and be taken up again: seconds that add up in a file."""

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

from adderkit.convert.files import write_json

# Seconds of which a kill loses the account at most.
NOTED_EVERY = 10


def cost(target: Path) -> dict[str, float]:
    """Seconds by the clock and seconds of CPU time that a file has noted; 0 where there is no file."""
    known = {"seconds": 0.0, "cpu_seconds": 0.0}
    return {**known, **json.loads(target.read_text())} if target.exists() else known


def timed(folder: Path, command: list[str], target: Path) -> None:
    """Run adderkit's command line in a folder, and add what it takes to a file, now and then already while it runs.

    CPU time is that of all threads, and of the processes that the command has ended; other work on the machine makes it
    little longer, unlike the time by the clock.

    Raises:
        subprocess.CalledProcessError: The command failed.
        KeyboardInterrupt: This process was told to stop; so was the command before, and it has ended.
    """
    before, started, used = cost(target), time.perf_counter(), _ended_children()

    def note(cpu: float) -> None:
        now = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}
        write_json(target, {key: round(before[key] + value, 1) for key, value in now.items()})

    print("$ adderkit", *command, file=sys.stderr, flush=True)
    child = subprocess.Popen([sys.executable, "-m", "adderkit", *command], cwd=folder, stdout=subprocess.DEVNULL)
    try:
        while child.poll() is None:
            with contextlib.suppress(psutil.Error):  # it may have ended since
                note(sum(psutil.Process(child.pid).cpu_times()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(NOTED_EVERY)
    finally:
        child.terminate()
        child.wait()
        note(_ended_children() - used)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)


def _ended_children() -> float:
    """CPU seconds of this process's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
