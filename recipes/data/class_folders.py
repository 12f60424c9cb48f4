"""Images in class folders: numbered as timm numbers them, with what timm's reader skips or merges silently refused."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from timm.utils.misc import natural_key

from ...convert.errors import DatasetError
from .notices import notify

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Formats of photographs that users have, but that PIL reads with plugins or only in part.
_UNREAD = (".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".jfif", ".svg", ".tga", ".dng", ".cr2", ".nef")
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


class ClassFolders:
    """Reader of class folders: a class is a folder with images, named as the folder.

    Classes are in natural order ("2" before "10", ignoring case), and so are images, as in timm's
    ``ReaderImageFolder``. Hidden files and folders are left out.

    Args:
        root: Folder of the split.

    Raises:
        DatasetError: There are no images, or it is not clear which class an image belongs to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        images, left_out = _scan(root)
        _check_places(root, images)
        folders = sorted(images, key=lambda folder: natural_key(_class_name(folder)))
        self.class_to_idx = {_class_name(folder): index for index, folder in enumerate(folders)}
        samples = [(path, self.class_to_idx[_class_name(folder)]) for folder in folders for path in images[folder]]
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))
        if left_out:
            listed = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
            notify(f"{root}: left out {listed}; images are read from {' '.join(_SUFFIXES)}")
        if any(os.path.dirname(folder) != str(root) for folder in folders):
            notify(f"{root}: class folders are nested; as in timm, the innermost ones name the classes")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def filename(self, index: int, absolute: bool = False) -> str:
        """Return the path of an image, or that relative to the split's folder."""
        path = self.samples[index][0]
        return path if absolute else os.path.relpath(path, self.root)


def _scan(root: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """Return the images of each folder, including folders without any, and the numbers of files that are left out."""
    images: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    for folder, names, folders in _walk(str(root), ()):
        found = []
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in _SUFFIXES:
                found.append(os.path.join(folder, name))
            elif suffix in _UNREAD:
                left_out[suffix] += 1
        if found or not folders:
            images[folder] = found
    return images, left_out


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each visible folder with the names of its files and of its visible folders; links are followed.

    Raises:
        DatasetError: A folder cannot be listed, or a link leads back to a folder above it.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [each for each in entries if not each.name.startswith(".") and each.name not in _SYSTEM_FOLDERS]
            folders = sorted(each.name for each in visible if each.is_dir())
    except OSError as error:
        raise DatasetError(f"cannot list {folder}: {error.strerror or error}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DatasetError(f"{folder} is a link to a folder that contains it; remove the link")
    inside = set(folders)
    yield folder, sorted(each.name for each in visible if each.name not in inside), folders
    for name in folders:
        yield from _walk(os.path.join(folder, name), (*above, identity))


def _check_places(root: Path, images: dict[str, list[str]]) -> None:
    """Require that every folder's class is clear: its name, its images, and whether it is a class at all.

    Raises:
        DatasetError: It is not; the message names a folder or an image.
    """
    if not any(images.values()):
        raise DatasetError(f"{root} has 0 images; expected class folders with files {' '.join(_SUFFIXES)}")
    beside = images.get(str(root))
    if beside:
        raise DatasetError(f"{beside[0]} is next to the class folders; move it into one of them, or remove it")
    names: dict[str, str] = {}
    for folder, files in images.items():
        if not files:
            raise DatasetError(f"class folder {folder} has no images, so classes would be numbered without it; "
                               "add images or remove the folder")  # fmt: skip
        parent = next((each for each in map(str, Path(folder).parents) if each in images), None)
        if parent is not None:
            raise DatasetError(f"{parent} has images as well as a class folder, {folder}; move one or the other")
        alike = _class_name(folder).casefold()
        if alike in names:
            raise DatasetError(
                f"class folders {names[alike]} and {folder} have the same name, ignoring case; "
                "rename one, or merge them"
            )
        names[alike] = folder


def _class_name(folder: str) -> str:
    """Return the name of a class folder, its accented letters composed: macOS and Linux may write them differently."""
    return unicodedata.normalize("NFC", os.path.basename(folder))
