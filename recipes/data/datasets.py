"""Image data sets opened by their ``--dataset`` name: built-in ones, class folders, or any of timm's readers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from timm.data import create_dataset, resolve_model_data_config
from timm.models import get_model_input_config
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset

from ...convert.errors import DatasetError
from .class_folders import ClassFolders
from .images import ConvertedImages, DecodedImages, image_name
from .labels import Labels
from .small import SMALL_DATASETS, SmallDataset
from .splits import find_split_folder, open_torchvision
from .streams import StreamedImages, open_stream

# Packages that timm's readers need but timm does not install.
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}
_STREAMS = ("wds", "hfids", "tfds")


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


def open_dataset(
    spec: str, data_dir: str | None, split: str, in_chans: int = 3, *, training: bool | None = None
) -> ImageSource:
    """Open a split of a data set, without any transform.

    Args:
        spec: ``digits``, ``fashion-mnist``, ``folder`` (class folders in ``data_dir``), or a name for timm's
            ``create_dataset`` such as ``hfds/…``, ``wds/…``, ``torch/…``.
        data_dir: Folder with the files; optional for ``digits`` and for an installed ``fashion-mnist``.
        split: Name of the split, such as ``train`` or ``validation``.
        in_chans: Number of channels to decode images to, 1 or 3.
        training: Shuffle a stream, and fill up its last batches; by default for a split named ``train``.

    Raises:
        DatasetError: The data set is unknown or missing; the message says how to get it.
    """
    check_name(spec, data_dir)
    if in_chans not in (1, 3):
        raise DatasetError(f"the model takes {in_chans} channels, expected 1 or 3: images are read as gray or RGB")
    small = SMALL_DATASETS.get(spec)
    if small is not None:
        return small.open(data_dir, split, in_chans)
    mode = "L" if in_chans == 1 else "RGB"
    if spec == "folder":
        return cast(ImageSource, DecodedImages(ClassFolders(find_split_folder(str(data_dir), split)), mode))
    reader = spec.split("/")[0].lower()
    package = _PACKAGES.get(reader)
    if package is not None and find_spec(package) is None:
        raise DatasetError(f"--dataset {spec} needs the package {package}: pip install {package}")
    try:
        if reader in _STREAMS:
            dataset: Any = open_stream(
                spec, data_dir, split, mode, training=split == "train" if training is None else training
            )
        elif reader == "torch":
            dataset = ConvertedImages(open_torchvision(spec, data_dir, split), mode)
        else:
            dataset = DecodedImages(create_dataset(spec, root=data_dir, split=split, download=False).reader, mode)
    except DatasetError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DatasetError(
            f"data set {spec!r}, split {split!r}, cannot be opened: {reason}; check --data-dir and the split names "
            "(--train-split, --val-split)"
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
    if spec in (*SMALL_DATASETS, "folder"):
        return
    reader, slash, _ = spec.partition("/")
    if not slash or reader.lower() not in (*_PACKAGES, "torch"):  # timm reads any other as class folders
        raise DatasetError(
            f"--dataset is {spec!r}, expected {', '.join(SMALL_DATASETS)}, folder (with --data-dir), "
            "or a timm reader such as hfds/NAME, wds/NAME or torch/NAME"
        )


def class_names(dataset: ImageSource) -> list[str] | None:
    """Return the class names in order of class index, or ``None`` if the data set does not know them."""
    if isinstance(dataset, Subset | ConvertedImages):
        return class_names(cast(ImageSource, dataset.dataset))
    if isinstance(dataset, LabeledImages | StreamedImages) and dataset.class_names is not None:
        return list(dataset.class_names)
    if isinstance(dataset, LabeledImages):
        return None
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)  # ImageNet's classes are synonyms
    if names is not None:
        return list(names) if all(isinstance(name, str) for name in names) else None
    index: Mapping[str, int] = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    ordered = sorted(index, key=index.__getitem__)
    # Of names that occur twice, the reader keeps one.
    return ordered if ordered and [index[name] for name in ordered] == list(range(len(ordered))) else None


class LabeledImages(Dataset[tuple[Any, int]]):
    """A data set with its labels translated to class indices.

    Args:
        dataset: Data set of ``(image, label)``.
        labels: Function of a label.
    """

    def __init__(self, dataset: ImageSource, labels: Callable[[Any], int]) -> None:
        self.dataset = dataset
        self.labels = labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Class names in order of class index, if they are known."""
        return self.labels.names if isinstance(self.labels, Labels) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        try:
            return image, self.labels(label)
        except DatasetError as error:
            raise DatasetError(f"{image_name(self.dataset, index)}: {error}") from error


def with_labels(dataset: ImageSource, labels: Callable[[Any], int]) -> ImageSource:
    """Return the data set with its labels translated; a stream is changed in place."""
    if isinstance(dataset, StreamedImages):
        dataset.labels = labels
        return cast(ImageSource, dataset)
    return cast(ImageSource, LabeledImages(dataset, labels))


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
