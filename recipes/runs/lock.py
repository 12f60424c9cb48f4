"""Lock of a run folder: one command at a time trains in it."""

import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...convert.errors import RecipeError

LOCK_FILE = ".lock"
_PATIENCE = 60.0  # seconds; processes that lost their launcher take up to 20 to end
_SECONDS_BETWEEN_TRIES = 0.5


@contextmanager
def folder_lock(folder: Path, say: Callable[[str], None], patience: float = _PATIENCE) -> Iterator[None]:
    """Hold the lock of a run folder inside the ``with`` block; wait a little for a process that is about to end.

    The lock belongs to this process alone, not to the loader processes that it forks, and ends with it.

    Args:
        folder: The run folder, which is made if need be.
        say: Called with a line if there is something to wait for, or if the file system has no locks.
        patience: Seconds to wait.

    Raises:
        RecipeError: Another process holds the lock, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        if _acquire(file.fileno(), folder, say, patience):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def _acquire(descriptor: int, folder: Path, say: Callable[[str], None], patience: float) -> bool:
    """Lock an open file; return whether its file system can do that."""
    deadline = time.monotonic() + patience
    waiting = False
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = (folder / LOCK_FILE).read_text(encoding="utf-8") or "another process"
            if time.monotonic() > deadline:
                raise RecipeError(
                    f"{folder} is in use: {holder} is training in it; wait for it to end, or stop it"
                ) from error
            if not waiting:
                say(f"waiting for {holder} to finish training in {folder}")
            waiting = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        except OSError as error:
            say(f"cannot lock {folder} ({error.strerror}): make sure that no other command is training in it")
            return False
        else:
            return True
