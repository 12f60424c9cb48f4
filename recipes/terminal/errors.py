"""How the command line ends when its work failed: one line on standard error, and status 1."""

import sys
from os import environ
from time import sleep
from typing import NoReturn

from ...convert.errors import AdderkitError

_PATIENCE = 20.0  # seconds; on a busy machine a process takes some to end


def line_of(error: Exception) -> str:
    """One line for a person: the message alone where it is ours, else with the way to the traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, AdderkitError):
        return message
    return f"{type(error).__name__}: {message} (unexpected; run again with --debug for the traceback)"


def fail(message: str) -> NoReturn:
    """Print an error and end with status 1.

    Of several processes the first of a machine speaks at once; where the others' error is the same, it ends them.
    """
    process = int(environ.get("LOCAL_RANK", 0))
    if process:
        sleep(_PATIENCE)  # the launcher ends all of them as soon as one has failed
        message = f"process {process}: {message}"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
