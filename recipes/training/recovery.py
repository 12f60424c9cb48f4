"""Errors that end a run which can be resumed: one line with the reason and the command to resume."""

import sys
from collections.abc import Callable

from accelerate import PartialState
from torch.distributed import DistError

from ...convert.errors import AdderkitError, DatasetError
from ...convert.user_models import import_option
from ..distributed.worker import LOST, has_own_launcher, is_launched
from ..runs.folder import RunFolder, SaveError
from ..runs.state import Row

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo, where a process is gone


class LoaderError(AdderkitError):
    """The next images cannot be loaded; the run is between two optimizer steps."""


def run_with_recovery(begin: Callable[[], list[Row]], folder: RunFolder) -> list[Row]:
    """Run training and turn any failure that can be resumed into a one-line error with the resume command.

    Args:
        begin: ``run.start`` or ``run.resume`` with their arguments.
        folder: The folder of the run.

    Raises:
        AdderkitError: The line. A process that has nothing to add to the first exits silently with status 1.
    """
    try:
        return begin()
    except (KeyboardInterrupt, Exception) as error:
        lost = isinstance(error, DistError) or any(words in str(error) for words in _LOST)
        if (lost or isinstance(error, KeyboardInterrupt)) and not PartialState().is_main_process:
            sys.exit(1)
        reason = LOST if lost else _reason(error, folder)
        if reason is None or not (folder.path / "args.yaml").is_file():
            raise
        raise AdderkitError(f"{reason}; continue with: {resume_command(folder)}") from error


def resume_command(folder: RunFolder) -> str:
    """Return the command that resumes a run, which starts as many processes as the run had."""
    command = f"adderkit finetune {import_option()}--resume {folder.path}"
    if is_launched() and not has_own_launcher():
        return f"the same launcher, and its command {command}"
    return command


def _reason(error: BaseException, folder: RunFolder) -> str | None:
    """Return what ended a run that can be resumed; ``None`` where the error itself says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, LoaderError | SaveError):
        return text
    if isinstance(error, AdderkitError):
        return None
    if "DataLoader worker" in text:  # torch says so wherever the main process happens to be
        return loader_reason(error)
    if isinstance(error, OSError):
        place = error.filename or folder.path  # a write that fails knows no name
        return f"cannot read or write {place} ({error.strerror or text}); free some space, or repair the disk"
    return f"{type(error).__name__}: {text} (unexpected; --debug shows the traceback)"


def loader_reason(error: BaseException) -> str:
    """Return why there are no more images, and the remedy."""
    if isinstance(error, DatasetError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    if "DataLoader worker" in lines[0] and "Caught" not in lines[0]:
        return (
            f"a loader process died, perhaps for lack of memory ({lines[0].strip()}); "
            "lower --workers, or free some memory"
        )
    cause = lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"  # a loader process sends a traceback
    return f"cannot load an image ({cause}); repair or remove it"
