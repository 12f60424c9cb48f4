"""Where a verb writes its result: an existing one is replaced only if adderkit wrote it and the user asks for it.

While a new folder is filled, it holds a marker. What a killed command leaves is therefore not taken for a result, and
the same command can be repeated.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AdderkitError
from .files import PARTIAL

UNFINISHED = ".unfinished"
_MARKER = "adderkit is writing this folder, or was interrupted; run the same command again.\n"


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """Kind of folder that a verb writes.

    Args:
        name: What the folder is, with an article, for messages.
        is_ours: Returns whether a folder is an earlier result of this kind, which may be replaced.
        is_taken: Returns whether an existing folder holds anything that a result would replace, or does not belong
            beside one; by default anything.
    """

    name: str
    is_ours: Callable[[Path], bool]
    is_taken: Callable[[Path], bool] = lambda folder: any(folder.iterdir())


def check_output_file(what: str, target: Path, suffixes: tuple[str, ...], expected: str, *, overwrite: bool) -> None:
    """Refuse a file that exists or cannot be written, before the work that produces it.

    Args:
        what: Name of the file in messages.
        target: The file.
        suffixes: Allowed file extensions, in lower case; they keep a slip from replacing a file of another kind.
        expected: The allowed extensions in words, for messages.
        overwrite: Allow the file to exist.

    Raises:
        AdderkitError: The extension is not allowed, the target is a folder or exists, or its folder is not writable.
    """
    if target.suffix.lower() not in suffixes:
        raise AdderkitError(f"{what} ends in {target.suffix!r}, expected {expected}")
    if target.is_dir():
        raise AdderkitError(f"{what} is a folder, expected a file")
    if target.exists() and not overwrite:
        raise AdderkitError(f"{what} exists already; give another file, or replace it with --overwrite")
    _check_writable(what, target.absolute().parent)


@contextmanager
def output_folder(folder: Path, kind: FolderKind, *, overwrite: bool) -> Iterator[None]:
    """Refuse a folder that exists or cannot be written, before the work that fills it inside the context.

    A folder that holds nothing yet is marked as unfinished until the context ends without an error. If the work fails
    before it has written anything, the folder is removed.

    Args:
        folder: Folder given with ``--output``, or its default.
        kind: Kind of folder.
        overwrite: Allow the folder to be an earlier result of the same kind, whose files the work replaces.

    Raises:
        AdderkitError: The folder is taken, or is not a writable directory.
    """
    what = f"--output {folder}"
    _check_writable(what, folder)
    there, marker = folder.exists(), folder / UNFINISHED
    if there and not marker.exists() and kind.is_taken(folder):
        _check_replaceable(what, folder, kind, overwrite)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(_MARKER, encoding="utf-8")
    for leftover in folder.rglob(f".*{PARTIAL}"):
        leftover.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if marker.exists() and all(each == marker for each in folder.iterdir()):
            marker.unlink()
            if not there:
                folder.rmdir()
        raise
    marker.unlink(missing_ok=True)


def _check_replaceable(what: str, folder: Path, kind: FolderKind, overwrite: bool) -> None:
    if not kind.is_ours(folder):
        raise AdderkitError(
            f"{what} holds files that do not belong to {kind.name}, so nothing is written there; give a new or an "
            "empty folder"
        )
    if not overwrite:
        raise AdderkitError(
            f"{what} exists already and holds {kind.name}; give another folder, or replace it with --overwrite"
        )


def _check_writable(what: str, target: Path) -> None:
    """Refuse a folder if it, or the closest parent that exists, is not a writable directory."""
    there = target.absolute()
    folder = next(each for each in (there, *there.parents) if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise AdderkitError(f"cannot write {what}: {folder} is not a writable directory")
