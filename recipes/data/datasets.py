"""Image data sets opened by their ``--dataset`` name: built-in ones, class folders, or any of timm's readers."""

import dataclasses
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from timm.data import create_dataset, resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn
from torch.utils.data import IterableDataset, Subset

from ...convert.errors import DatasetError
from .small import SMALL_DATASETS, SmallDataset

# Folder names that timm accepts for a split.
_SPLIT_FOLDERS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test", "testing"))
# Packages that timm's readers need but timm does not install.
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}


class ImageSource(Protocol):
    """A data set of ``(PIL image, class index)``, without transform, as timm's data sets are when just opened."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Image preparation that a model expects: the keys of timm's data configuration used here.

    Args:
        input_size: ``(channels, height, width)``.
        mean: Mean of each channel, for pixel values between 0 and 1.
        std: Standard deviation of each channel, for pixel values between 0 and 1.
        interpolation: timm's name of the resampling filter.
        crop_pct: Fraction of the image's side kept by the evaluation crop.
        crop_mode: timm's crop mode for evaluation, such as ``center``.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module) -> "DataConfig":
        """Return the data configuration of a timm model."""
        resolved = resolve_model_data_config(model)
        size = get_model_input_config(model)["input_size"]
        mean, std = tuple(resolved["mean"]), tuple(resolved["std"])
        if len(mean) != size[0]:  # as timm adapts a stem to another number of channels
            mean, std = ((math.fsum(values) / len(values),) * size[0] for values in (mean, std))
        return cls(tuple(size), mean, std, resolved["interpolation"], resolved["crop_pct"], resolved["crop_mode"])


def open_dataset(spec: str, data_dir: str | None, split: str, in_chans: int = 3) -> ImageSource:
    """Open a split of a data set, without any transform.

    Args:
        spec: ``digits``, ``fashion-mnist``, ``folder`` (class folders in ``data_dir``), or a name for timm's
            ``create_dataset`` such as ``hfds/…``, ``wds/…``, ``torch/…``.
        data_dir: Folder with the files; optional for ``digits`` and for an installed ``fashion-mnist``.
        split: ``train`` or ``validation``.
        in_chans: Number of channels to decode images to, 1 or 3.

    Raises:
        DatasetError: The data set is unknown or missing; the message says how to get it.
    """
    check_name(spec, data_dir)
    small = SMALL_DATASETS.get(spec)
    if small is not None:
        return small.open(data_dir, split, in_chans)
    if data_dir and spec == "folder":
        _check_split_folder(Path(data_dir), split)
    package = _PACKAGES.get(spec.split("/")[0])
    if package is not None and find_spec(package) is None:
        raise DatasetError(f"--dataset {spec} needs the package {package}: pip install {package}")
    try:
        dataset = create_dataset(
            "" if spec == "folder" else spec,
            root=data_dir,
            split=split,
            is_training=split == "train",
            download=False,
            input_img_mode="L" if in_chans == 1 else "RGB",
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DatasetError(
            f"data set {spec!r}, split {split!r}, cannot be opened: {reason}; check --data-dir and the split names"
        ) from error
    return cast(ImageSource, dataset)


def check_name(spec: str, data_dir: str | None) -> None:
    """Check that a data set name is one that ``open_dataset`` understands, without looking for images.

    Raises:
        DatasetError: The name is empty or unknown, or needs a data folder.
    """
    if not spec:
        raise DatasetError("no data set was given; name one with --dataset, such as digits, fashion-mnist or folder")
    if spec == "folder" and not data_dir:
        raise DatasetError(
            "--dataset folder needs --data-dir, a folder with train/CLASS/*.jpg and validation/CLASS/*.jpg"
        )
    if spec not in (*SMALL_DATASETS, "folder") and "/" not in spec:
        raise DatasetError(
            f"--dataset is {spec!r}, expected {', '.join(SMALL_DATASETS)}, folder (with --data-dir), "
            "or a timm reader such as hfds/NAME, wds/NAME or torch/NAME"
        )


def _check_split_folder(root: Path, split: str) -> None:
    """Require the folder of a split; without it timm would read the root, and evaluate on training images."""
    if not root.is_dir():
        raise DatasetError(f"--data-dir {root} does not exist; expected a folder with train/ and validation/")
    names = next((group for group in _SPLIT_FOLDERS if split in group), (split,))
    if not any((root / name).is_dir() for name in names):
        found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:8]) or "no folders"
        raise DatasetError(f"--data-dir {root} has no split {split!r}: expected {' or '.join(names)}, found {found}")


def class_names(dataset: ImageSource) -> list[str] | None:
    """Return the class names in order of class index, or ``None`` if the data set does not know them."""
    if isinstance(dataset, Subset):
        return class_names(cast(ImageSource, dataset.dataset))
    names = getattr(dataset, "classes", None)
    if names is not None:
        return list(names)
    index: Mapping[str, int] | None = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(index, key=index.__getitem__) if index else None


def small_dataset(spec: str) -> SmallDataset | None:
    """Return the properties of a built-in data set (image size, classes, statistics), or ``None`` for any other."""
    return SMALL_DATASETS.get(spec)


def subset(dataset: ImageSource, count: int, seed: int) -> ImageSource:
    """Return ``count`` images chosen by ``seed``, or the whole data set for 0 and for more than it has.

    Raises:
        DatasetError: The data set is streamed, so that images cannot be chosen by index.
    """
    if count <= 0 or count >= len(dataset):
        return dataset
    if isinstance(dataset, IterableDataset):
        raise DatasetError(f"{count} images cannot be chosen from a streamed data set; expected 0, all of them")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return cast(ImageSource, Subset(cast(Any, dataset), chosen.tolist()))
