"""Exchange between processes: values and files of the main one, and checks that all have the same."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ...convert.errors import RecipeError


def from_main(value: Any) -> Any:
    """Return the main process's value; called on all processes."""
    received = [value]
    broadcast_object_list(received)
    return received[0]


def require_same(what: str, value: Any) -> None:
    """Refuse values that differ between processes, as where machines have different copies of a data set.

    Args:
        what: Name of the value, for the message.
        value: This process's value; called on all processes.

    Raises:
        RecipeError: Some process has another value than the first.
    """
    values = gather_object([value]) if PartialState().num_processes > 1 else [value]
    for process, each in enumerate(values):
        if each != values[0]:
            raise RecipeError(
                f"process {process} has {each} {what}, expected {values[0]}, as on process 0; every machine needs the "
                "same data set"
            )


def is_shared(folder: Path) -> bool:
    """Return whether every process sees the folder of the main process; called on all processes."""
    state = PartialState()
    if state.num_processes == 1:
        return True
    mark = folder / from_main(f".seen-{token_hex(4)}")
    if state.is_main_process:
        mark.touch()
    state.wait_for_everyone()
    seen = all(gather_object([mark.exists()]))
    if state.is_main_process:
        mark.unlink()
    return seen


def require_shared(folder: Path) -> None:
    """Refuse a folder that some process does not see; called on all processes.

    Raises:
        RecipeError: It is on one machine only.
    """
    if not is_shared(folder):
        raise RecipeError(
            f"{folder} is on one machine only, expected a file system that all machines share: with FSDP2, each "
            "process saves its part; give a shared --output, or start without FSDP2"
        )


@contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """Yield a folder of the main process: itself if all processes see it, else a temporary copy on those that do not.

    Called on all processes. The folder need not exist.
    """
    state = PartialState()
    if is_shared(folder.parent):
        yield folder
        return
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        for name in from_main(names):
            content = from_main((folder / name).read_bytes() if state.is_main_process else None)
            if not state.is_main_process:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)
        yield folder if state.is_main_process else copy
