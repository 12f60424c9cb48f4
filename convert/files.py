"""Files that are whole or not there: written beside their place and moved into it, and JSON read with care."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import AdderkitError, CheckpointError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder; on success it is synced to disk and takes the target's place.

    A process killed at any moment leaves the old file or the new one, never half of one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's own mode would keep other users from reading
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_file_target(what: str, target: Path, suffixes: tuple[str, ...], expected: str) -> None:
    """Find out before the work whether a file can be written.

    Args:
        what: How messages call it.
        target: The file.
        suffixes: In small letters, one of which it is to end in.
        expected: How messages call these.

    Raises:
        AdderkitError: The extension is another, the target is a folder, or its folder cannot be written to.
    """
    if target.suffix.lower() not in suffixes:
        raise AdderkitError(f"{what} ends in {target.suffix!r}, expected {expected}")
    if target.is_dir():
        raise AdderkitError(f"{what} is a folder, expected a file")
    check_folder_target(what, target.absolute().parent)


def check_folder_target(what: str, target: Path) -> None:
    """Find out before the work whether a folder can be made or written in.

    Args:
        what: How messages call it.
        target: The folder.

    Raises:
        AdderkitError: It, or what it is to be made in, is no folder or cannot be written to.
    """
    there = target.absolute()
    folder = next(each for each in (there, *there.parents) if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise AdderkitError(f"{what} cannot be written: {folder} is no folder that you may write to")


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_pieces(target: Path, pieces: Iterable[str]) -> None:
    """Write a text file atomically, UTF-8, piece by piece, for what is too long to be held as one text."""
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(pieces)


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def replace_folder(target: Path, fresh: Path) -> None:
    """Move a finished folder into the place of another one, if there is one.

    Two renames, so a kill between them leaves the old folder under ``.<name>.old``; ``recover_folder`` brings it back.

    Args:
        target: The folder to replace.
        fresh: What takes its place; on the same file system.
    """
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Undo a ``replace_folder`` that was cut off between its two renames."""
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
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
