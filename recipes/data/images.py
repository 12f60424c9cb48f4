"""Strict reading of images: every pixel format is converted in a documented way or refused, and nothing is replaced.

timm's ``ImageDataset`` answers a damaged file with the next image and that image's label, and PIL clips 16-bit pixels
to white. ``docs/usage.md`` lists what is done here instead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from torch.utils.data import Dataset

from ...convert.errors import DatasetError

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # PIL may open their 16-bit pixels in mode I


class DecodedImages(Dataset[tuple[Any, int]]):
    """Images of one of timm's map-style readers, decoded strictly.

    Args:
        reader: Reader whose items are ``(open file, label)``.
        mode: PIL mode of the images, ``L`` or ``RGB``.
    """

    def __init__(self, reader: Any, mode: str) -> None:
        self.reader = reader
        self.mode = mode

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with naming(partial(image_name, self, index)):
            file, label = self.reader[index]
            with file:
                return decode_image(file, self.mode), label

    def filename(self, index: int) -> str | None:
        """Return the path of an image, if it has one."""
        name: str | None = self.reader.filename(index, absolute=True)
        return name


class ConvertedImages(Dataset[tuple[Any, int]]):
    """Images of a data set that decodes them itself, such as torchvision's, converted strictly.

    Args:
        dataset: Data set of ``(PIL image, label)``. One that opens files with a ``loader`` gets a strict one.
        mode: PIL mode of the images, ``L`` or ``RGB``.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset = dataset
        self.mode = mode
        if hasattr(dataset, "loader"):
            dataset.loader = _open_and_decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with naming(partial(image_name, self, index)):
            image, label = self.dataset[index]
            return to_mode(image, self.mode), label

    def filename(self, index: int) -> str | None:
        """Return the path of an image, if it has one."""
        samples = getattr(self.dataset, "samples", None)
        return None if samples is None else str(samples[index][0])


def decode_image(file: BinaryIO, mode: str) -> Image.Image:
    """Decode an image file to 8-bit pixels; of several frames or pages, the first.

    Args:
        file: Open file.
        mode: PIL mode to convert to, ``L`` or ``RGB``.

    Raises:
        Exception: The file is not an image, is damaged, or has pixels without a known range.
    """
    require_whole_images()
    with Image.open(file) as image:
        image.load()
        return to_mode(image, mode)


def require_whole_images() -> None:
    """Refuse PIL's setting that fills up truncated images.

    Raises:
        DatasetError: It is on.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DatasetError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True, expected False: the missing part of an image would be gray"
        )


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8-bit gray or RGB: of 16-bit pixels the high byte is taken, and transparency is dropped.

    Args:
        image: Decoded image.
        mode: ``L`` or ``RGB``.

    Raises:
        DatasetError: The pixels have 32 bits, whose range is not known.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # as PIL does for 16-bit RGB
    elif image.mode in ("I", "F"):
        raise DatasetError(f"its pixels have 32 bits (PIL mode {image.mode}), expected 8 or 16; convert it to 8 bits")
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # directly, PIL would warn
    return image.convert(mode)


def image_name(dataset: Any, index: int) -> str:
    """Return the file name of an image for a message, or its number where it has none."""
    try:
        name = dataset.filename(index)
    except Exception:  # a reader that cannot name its images
        name = None
    return str(name or f"image {index}")


@contextmanager
def naming(name: Callable[[], str]) -> Iterator[None]:
    """Turn any error inside the context into one line that names the image.

    Args:
        name: Returns the name; only called after an error.

    Raises:
        DatasetError: The line.
    """
    try:
        yield
    except Exception as error:
        raise DatasetError(f"cannot read {name()}: {_reason(error)}; repair or remove it") from error


def _open_and_decode(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return decode_image(file, "RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is not in an image format that PIL knows"
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text or type(error).__name__
