"""How a run ends before its time, saying how to go on, and how one that was started again goes on by itself."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from ...convert.errors import AdderkitError
from ..runs.folder import RunFolder, SaveError
from ..runs.state import Row

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo, where a process is gone


class LoaderError(AdderkitError):
    """The next images cannot be had; the run is between two optimizer steps."""


def run_with_recovery(begin: Callable[[], list[Row]], folder: RunFolder) -> list[Row]:
    """Run a run; whatever ends it that is not its arguments' fault is told in one line, with the command to go on.

    Args:
        begin: ``finetune.start`` or ``finetune.resume`` with their arguments.
        folder: Where the run is.

    Raises:
        AdderkitError: The line. A process that has nothing to say beside the first exits silently with status 1.
    """
    _meet_again()
    try:
        return begin()
    except (KeyboardInterrupt, Exception) as error:
        lost = any(words in str(error) for words in _LOST)
        if (lost or isinstance(error, KeyboardInterrupt)) and not PartialState().is_main_process:
            sys.exit(1)
        reason = "another process of the run ended, and has said why" if lost else _reason(error, folder)
        if reason is None or not (folder.path / "args.yaml").is_file():
            raise
        raise AdderkitError(f"{reason}; continue with: adderkit finetune --resume {folder.path}") from error


def _restarts() -> int:
    """How often the elastic launcher has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _meet_again() -> None:
    """After a restart: let the processes find each other under keys of its own.

    The launcher's store may still have the addresses of the processes that are gone, for which gloo would wait.
    """
    if _restarts() and not dist.is_initialized():
        rank, processes, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=rank == 0 and not served)  # type: ignore[attr-defined]
        fresh = dist.PrefixStore(f"restart-{_restarts()}", store)  # type: ignore[attr-defined]
        dist.init_process_group(store=fresh, rank=rank, world_size=processes)


def _reason(error: BaseException, folder: RunFolder) -> str | None:
    """What ended a run that can go on; ``None`` where the error itself says what to do."""
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
        return f"{place} cannot be written or read ({error.strerror or text}); free some space, or mend the disk"
    return f"{type(error).__name__}: {text} (unexpected; --debug shows the traceback)"


def loader_reason(error: BaseException) -> str:
    """Why there are no more images, and what helps."""
    lines = str(error).strip().splitlines() or [""]
    if "DataLoader worker" in lines[0] and "Caught" not in lines[0]:
        return f"a loader process died, perhaps for want of memory ({lines[0].strip()}); see --workers and free memory"
    cause = lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {lines[0]}"  # a loader process sends a traceback
    return f"an image cannot be had ({cause}); mend or remove it"


def begun_before(folder: RunFolder, arguments: dict[str, Any]) -> bool:
    """Whether the elastic launcher (``torchrun --max-restarts``) has started a run again that stands in the folder.

    Args:
        folder: The run's.
        arguments: What a new run would write; another run's folder is not taken for this one's.

    Raises:
        RecipeError: What stands there is damaged.
    """
    if _restarts() == 0 or not (folder.path / "args.yaml").is_file():
        return False
    there = folder.arguments()
    return all(there.get(name) == value for name, value in arguments.items())
