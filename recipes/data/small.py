"""Built-in data sets: scikit-learn's digits, and Fashion-MNIST read from its IDX files."""

import dataclasses
import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...convert.errors import DatasetError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IDX_TYPES = {3: ("images", "images-idx3-ubyte"), 1: ("labels", "labels-idx1-ubyte")}
_LIMIT = 1 << 30  # bytes of one unpacked IDX file; Fashion-MNIST's largest has 47 MB


class ImageArray:
    """Grayscale images in memory.

    Args:
        images: Pixels ``[N, H, W]``, uint8.
        targets: Class indices ``[N]``.
        classes: Class names in order of class index.
        mode: PIL mode that images are converted to, ``L`` or ``RGB``.
    """

    def __init__(
        self, images: npt.NDArray[np.uint8], targets: npt.NDArray[np.int64], classes: list[str], mode: str = "L"
    ) -> None:
        self.mode = mode
        self.images = images
        self.targets = targets
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.targets[index])


@dataclasses.dataclass(frozen=True)
class SmallDataset:
    """A data set with known properties, from which a new model takes channels, classes, image size and normalization.

    Args:
        read: Function of a data folder and a split that returns ``(images, targets)``.
        classes: Class names in order of class index.
        input_size: ``(channels, height, width)``.
        mean: Mean of each channel over the training split, for pixel values between 0 and 1.
        std: Standard deviation of each channel over the training split, for pixel values between 0 and 1.
    """

    read: Callable[[str | None, str], tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def open(self, data_dir: str | None, split: str, in_chans: int = 1) -> ImageArray:
        """Read a split: ``train``, or ``validation`` (alias ``val`` and ``test``); images are RGB for 3 channels.

        Raises:
            DatasetError: The split is unknown, or files are missing or damaged.
        """
        known = {"train": "train", "validation": "validation", "val": "validation", "test": "validation"}
        if split not in known:
            raise DatasetError(f"split is {split!r}, expected one of {', '.join(known)}")
        return ImageArray(*self.read(data_dir, known[split]), list(self.classes), "RGB" if in_chans == 3 else "L")


def _read_digits(data_dir: str | None, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read 1,797 handwritten digits of 8x8 pixels (UCI, shipped with scikit-learn); every fifth is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("data set 'digits' needs the package scikit-learn: pip install 'adderkit[demo]'") from error
    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 5 == 0
    chosen = held_out if split == "validation" else ~held_out
    images = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    return images, digits.target[chosen].astype(np.int64)


def _read_fashion_mnist(data_dir: str | None, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read 60,000 training or 10,000 validation images of clothing, 28x28 pixels (Xiao et al., arXiv 1708.07747)."""
    folder = Path(data_dir) if data_dir else DEBIAN_FASHION_MNIST
    prefix = "train" if split == "train" else "t10k"
    images, targets = (_read_idx(folder, prefix, rank) for rank in (3, 1))
    if len(images) != len(targets):
        raise DatasetError(
            f"{folder} has {len(images)} {prefix} images but {len(targets)} labels; download the files again"
        )
    if len(targets) and targets.max() > 9:
        raise DatasetError(f"{folder} has a {prefix} label {targets.max()}, expected 0 to 9 for Fashion-MNIST")
    return images, targets.astype(np.int64)


def _read_idx(folder: Path, prefix: str, rank: int) -> npt.NDArray[np.uint8]:
    """Read a ubyte IDX file, optionally gzipped: magic ``00 00 08 rank``, big-endian sizes, then the data."""
    what, suffix = _IDX_TYPES[rank]
    name = f"{prefix}-{suffix}"
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DatasetError(
            f"no {what} file {name}[.gz] in {folder}; get Fashion-MNIST with 'apt-get install dataset-fashion-mnist' "
            "(which makes --data-dir unnecessary), or name the folder with its four IDX files with --data-dir"
        )
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged: {error}; download it again") from error
    header = 4 + 4 * rank
    if len(data) > _LIMIT or len(data) < header or data[:4] != bytes((0, 0, 8, rank)):
        raise DatasetError(f"{path} is not an IDX file of {what}: expected it to begin with 00 00 08 0{rank}")
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank)]
    size = 1
    for length in shape:
        size *= length
    if len(data) != header + size:
        raise DatasetError(
            f"{path} has {len(data)} bytes, expected {header + size} for shape {shape}; download it again"
        )
    try:
        return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # zero images, with a height and width beyond what an array may have
        raise DatasetError(f"{path} has shape {shape}, which no array can have; download it again") from error


SMALL_DATASETS = {
    "digits": SmallDataset(_read_digits, tuple("0123456789"), (1, 8, 8), (0.3053,), (0.3761,)),
    "fashion-mnist": SmallDataset(
        _read_fashion_mnist,
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        (1, 28, 28),
        (0.2860,),
        (0.3530,),
    ),
}
