"""Splits of a data set: the folder of each, and torchvision's data sets, which take other names."""

from pathlib import Path
from typing import Any

from timm.data import create_dataset

from ...convert.errors import DatasetError
from .notices import notify

_TRAIN = ("train", "training")
_VALIDATION = ("validation", "val", "valid", "eval", "evaluation")
_TEST = ("test", "testing")
_IMAGE_FOLDERS = ("torch/folder", "torch/image_folder")


def find_split_folder(data_dir: str, split: str) -> Path:
    """Return the folder of a split, by its name or a synonym of timm's; ``test`` may stand in for validation.

    timm itself would read the whole of ``data_dir`` where there is no such folder, and evaluate on training images.

    Args:
        data_dir: Folder of the data set.
        split: Name of the split.

    Raises:
        DatasetError: There is no such folder.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise DatasetError(f"--data-dir {root} does not exist; expected a folder with train/ and validation/")
    names = next((group for group in (_TRAIN, _VALIDATION, _TEST) if split in group), (split,))
    found = _first_folder(root, (split, *names))
    if found is None and split in _VALIDATION:
        found = _first_folder(root, _TEST)
        if found is not None:
            notify(f"{root} has no {split!r} split; using {found.name!r}, as --val-split {found.name} does")
    if found is None:
        there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:8]) or "no folders"
        raise DatasetError(
            f"--data-dir {root} has no split {split!r}: expected {' or '.join(names)}, found {there}; "
            "name the folders with --train-split and --val-split"
        )
    return found


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def open_torchvision(spec: str, data_dir: str | None, split: str) -> Any:
    """Open one of torchvision's data sets through timm.

    Args:
        spec: ``torch/NAME``.
        data_dir: Folder with the files.
        split: Name of the split.

    Raises:
        DatasetError: The data set has no such split, or a hidden folder would become a class.
    """
    if spec.lower() in _IMAGE_FOLDERS and data_dir:
        root = find_split_folder(data_dir, split)
        hidden = next((path for path in root.iterdir() if path.is_dir() and path.name.startswith(".")), None)
        if hidden is not None:
            raise DatasetError(f"torchvision would treat {hidden} as a class; remove it, or use --dataset folder")
        return create_dataset(spec, root=str(root), split=split, search_split=False)
    dataset: Any = create_dataset(spec, root=data_dir, split=split, download=False)
    known = (*_TRAIN, *_VALIDATION, *_TEST)
    if isinstance(getattr(dataset, "train", None), bool) and split not in known:  # timm takes any other for the test
        raise DatasetError(f"the split of {spec} is {split!r}, expected one of {', '.join(known)}")
    return dataset
