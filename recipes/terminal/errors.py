"""Errors of the command line: one line on standard error, and exit status 1."""

import sys
from os import environ
from time import sleep
from typing import NoReturn

from ...convert.errors import AdderkitError
from ..distributed.worker import PATIENCE, tell_launcher


def one_line(error: Exception) -> str:
    """Return an error as one line: the message of ours, and a pointer to ``--debug`` for any other."""
    message = " ".join(str(error).split())
    if isinstance(error, AdderkitError):
        return message
    return f"{type(error).__name__}: {message} (unexpected; run again with --debug for the traceback)"


def fail(message: str) -> NoReturn:
    """Print an error and exit with status 1.

    adderkit's own launcher prints one line for all its processes. Under another one, the first process of each machine
    prints at once. The launcher then ends the others, which wait for that, so that an error that all of them have is
    printed once.
    """
    if tell_launcher(error=message):
        sys.exit(1)
    process = int(environ.get("LOCAL_RANK", 0))
    if process:
        sleep(PATIENCE)
        message = f"process {process}: {message}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
