"""The side of a process that a launcher started: it ends with the launcher, and reports to adderkit's own."""

import json
import os
import signal
import threading
import time

LAUNCHER = "ADDERKIT_LAUNCHER"  # "PID:FD" of the launcher and of the pipe to it
LOST = "another process of the run has ended"  # the error of one that was left alone
PATIENCE = 20.0  # seconds; on a busy machine, a process may take that long to end
_SECONDS_BETWEEN_LOOKS = 0.5


def is_launched() -> bool:
    """Return whether a launcher started this process: adderkit's own, accelerate's, torchrun."""
    return "LOCAL_RANK" in os.environ


def has_own_launcher() -> bool:
    """Return whether adderkit's own launcher started this process."""
    return LAUNCHER in os.environ


def follow_launcher() -> None:
    """Make this process end when its launcher does; does nothing in a process that no launcher started.

    A launcher that is killed cannot end its processes. They would train on, while the same command was begun again.
    """
    if not is_launched():
        return
    own = os.environ.get(LAUNCHER)
    launcher = os.getppid() if own is None else int(own.partition(":")[0])
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()


def tell_launcher(**message: str) -> bool:
    """Send a message to adderkit's own launcher; return whether there is one that receives it."""
    own = os.environ.get(LAUNCHER)
    if own is None:
        return False
    line = json.dumps({"rank": os.environ["RANK"], **message}) + "\n"
    try:
        os.write(int(own.partition(":")[2]), line.encode())
    except OSError:  # it was killed
        return False
    return True


def _end_with(launcher: int) -> None:
    """Wait for the launcher to die; then ask this process to stop, and end it if it does not."""
    while os.getppid() == launcher:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)
