"""Errors of the command line: one line on standard error, and exit status 1."""

import sys
from os import environ
from time import sleep
from typing import NoReturn

from ...convert.errors import AdderkitError

_PATIENCE = 20.0  # seconds; on a busy machine, a process may take that long to end


def one_line(error: Exception) -> str:
    """Return an error as one line: the message of ours, and a pointer to ``--debug`` for any other."""
    message = " ".join(str(error).split())
    if isinstance(error, AdderkitError):
        return message
    return f"{type(error).__name__}: {message} (unexpected; run again with --debug for the traceback)"


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 1.

    If a run has several processes, the first one of each machine prints at once. The launcher then ends the others,
    which wait for that, so that an error that all of them have is printed once.
    """
    process = int(environ.get("LOCAL_RANK", 0))
    if process:
        sleep(_PATIENCE)
        message = f"process {process}: {message}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
