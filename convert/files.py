"""Atomic writing of files and folders, and reading of JSON that somebody else may have written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CheckpointError

PARTIAL = ".partial"  # ending of the temporary files of ``atomic_path``, which a kill may leave


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success, sync the file to disk and move it to the target.

    A process that is killed at any moment leaves the old file or the new one, never a partial one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(PARTIAL, f".{target.name}.", target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's own mode lets only the user read it
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pieces(target: Path, pieces: Iterable[str]) -> None:
    """Write a text file atomically, in UTF-8, piece by piece, if it is too long to be held in memory at once."""
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(pieces)


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def replace_folder(target: Path, fresh: Path) -> None:
    """Move a finished folder to a target, replacing the folder that may be there.

    This takes two renames. A kill between them leaves the old folder under ``.<name>.old``, which ``recover_folder``
    restores.

    Args:
        target: The folder to replace.
        fresh: The folder to move, on the same file system.
    """
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a ``replace_folder`` that was killed between its two renames."""
    if not target.exists() and _old(target).exists():
        _old(target).rename(target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def read_json_object(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read a JSON object from a file that somebody else may have written.

    Raises:
        CheckpointError: The file is missing, too large, not JSON, or not an object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {limit}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
