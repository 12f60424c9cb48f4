"""Images by one ``--dataset`` spec: the embedded digits, Fashion-MNIST's files, or anything timm's readers take."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision import transforms

from ...convert.errors import DatasetError
from ..configs.recipe import Augmentation
from ..runs.signals import ignore_first_signal
from .reproducible import EpochImages, EpochOrder, EpochStream
from .small import SMALL_DATASETS, SmallDataset

# Folders that timm takes for a split.
_SPLIT_FOLDERS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"), ("test", "testing"))
# Packages of timm's readers that timm does not install.
_PACKAGES = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}

Transform = Callable[[Any], Tensor]


class ImageSource(Protocol):
    """A data set of ``(image, class index)`` whose transform can be set, as timm's data sets are."""

    transform: Transform | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How images are prepared for a model; the keys of timm's data configuration that matter here.

    Args:
        input_size: ``(channels, height, width)``.
        mean: Of each channel, for pixels between 0 and 1; ``std`` likewise.
        std: See ``mean``.
        interpolation: timm's name of the resampling filter.
        crop_pct: Share of the image's side that evaluation keeps.
        crop_mode: timm's way of cutting it out.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module) -> "DataConfig":
        """What the model's timm configuration asks for."""
        resolved = resolve_model_data_config(model)
        size = get_model_input_config(model)["input_size"]
        mean, std = tuple(resolved["mean"]), tuple(resolved["std"])
        if len(mean) != size[0]:  # as timm does for a stem of other channels
            mean, std = ((math.fsum(values) / len(values),) * size[0] for values in (mean, std))
        return cls(tuple(size), mean, std, resolved["interpolation"], resolved["crop_pct"], resolved["crop_mode"])


def open_dataset(spec: str, data_dir: str | None, split: str, in_chans: int = 3) -> ImageSource:
    """Open a split of a data set, images untransformed.

    Args:
        spec: ``digits``, ``fashion-mnist``, ``folder`` (class folders in ``data_dir``), or a name for timm's
            ``create_dataset`` such as ``hfds/…``, ``wds/…``, ``torch/…``.
        data_dir: Where the files are; the embedded and well-known places need none.
        split: ``train`` or ``validation``.
        in_chans: Channels that images are read with, 1 or 3.

    Raises:
        DatasetError: The data set is unknown or missing; the message says how to get it.
    """
    check_name(spec, data_dir)
    small = SMALL_DATASETS.get(spec)
    if small is not None:
        return cast(ImageSource, small.open(data_dir, split, in_chans))
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
    """Whether a spec is one that ``open_dataset`` understands, which it may be where there are no images yet.

    Raises:
        DatasetError: It is not.
    """
    if not spec:
        raise DatasetError("no data set is given; name one with --dataset, such as digits, fashion-mnist or folder")
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
    """Timm takes the root where a split's folder is missing, and would evaluate on the training images."""
    if not root.is_dir():
        raise DatasetError(f"--data-dir {root} does not exist; expected a folder with train/ and validation/")
    names = next((group for group in _SPLIT_FOLDERS if split in group), (split,))
    if not any((root / name).is_dir() for name in names):
        found = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:8]) or "no folder"
        raise DatasetError(f"--data-dir {root} has no split {split!r}: expected {' or '.join(names)}, found {found}")


def class_names(dataset: ImageSource) -> list[str] | None:
    """Names of the classes in order of their index, where the data set knows them."""
    names = getattr(dataset, "classes", None)
    if names is not None:
        return list(names)
    index: Mapping[str, int] | None = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(index, key=index.__getitem__) if index else None


def small_dataset(spec: str) -> SmallDataset | None:
    """Facts about a data set whose image size and statistics are known beforehand."""
    return SMALL_DATASETS.get(spec)


def evaluation_transform(config: DataConfig) -> Transform:
    """Timm's evaluation transform: resize, center crop, tensor, normalize."""
    return cast(
        Transform,
        create_transform(
            config.input_size,
            is_training=False,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            crop_pct=config.crop_pct,
            crop_mode=config.crop_mode,
        ),
    )


def training_transform(config: DataConfig, augmentation: Augmentation) -> Transform:
    """Timm's training transform, or padded random crops for small images."""
    common: dict[str, Any] = {
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
        "is_training": True,
    }
    if augmentation.crop_padding == 0:
        return cast(
            Transform,
            create_transform(
                config.input_size,
                scale=(augmentation.scale, 1.0),
                hflip=augmentation.hflip,
                color_jitter=augmentation.color_jitter or None,
                auto_augment=augmentation.auto_augment or None,
                re_prob=augmentation.reprob,
                **common,
            ),
        )
    size = config.input_size[1:]
    crop: Transform = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomCrop(size, padding=augmentation.crop_padding),
            transforms.RandomHorizontalFlip(augmentation.hflip),
            create_transform(config.input_size, no_aug=True, **common),
        ]
    )
    return crop


def make_loader(
    dataset: ImageSource, transform: Transform, batch_size: int, workers: int, *, training: bool, seed: int = 0
) -> DataLoader[Any]:
    """A loader of ``(images [N, C, H, W], targets [N])``.

    For training it is without a last partial batch, and shuffled and augmented as ``seed`` and the epoch say, which
    accelerate's ``set_epoch`` sets for the order and ``EpochImages.set_epoch`` for the images.
    """
    dataset.transform = transform
    workers = loader_workers(workers)
    images, order = cast(Dataset[Any], dataset), None
    if isinstance(dataset, IterableDataset):
        images = _stream(dataset, batch_size, workers, training=training, seed=seed)
    elif training:
        images, order = EpochImages(dataset, seed), EpochOrder(len(dataset), seed)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=order,
        drop_last=training and order is not None and len(dataset) > batch_size,
        num_workers=workers,
        worker_init_fn=ignore_first_signal,
        # Fresh workers each epoch: they are told its number when they start.
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )


def _stream(dataset: Any, batch_size: int, workers: int, *, training: bool, seed: int) -> EpochStream:
    """A streamed data set set up as timm does: shuffled by its reader, which fills the last batch of every worker up.

    For training, each process reads shards of its own; otherwise each reads all of them, since their images do not
    divide evenly.
    """
    reader = dataset.reader
    reader.batch_size, reader.common_seed = batch_size, seed
    if not training:
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    dataset.set_loader_cfg(num_workers=workers)
    return EpochStream(dataset, seed)


def loader_workers(wanted: int) -> int:
    """As many loader processes as are wanted, but not more than this process may use processors."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, processors)


def subset(dataset: ImageSource, count: int, seed: int) -> ImageSource:
    """A random subset of fixed choice; the whole set for 0 or for more than there are."""
    if count <= 0 or count >= len(dataset):
        return dataset
    if isinstance(dataset, IterableDataset):
        raise DatasetError(f"{count} images cannot be chosen from a streamed data set; expected 0, all of them")
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return _View(cast(Dataset[Any], dataset), chosen.tolist())


class _View(Subset[Any]):
    """A subset whose transform is the data set's own."""

    dataset: Any

    @property
    def transform(self) -> Transform | None:
        return cast("Transform | None", self.dataset.transform)

    @transform.setter
    def transform(self, value: Transform | None) -> None:
        self.dataset.transform = value

    @property
    def classes(self) -> list[str] | None:
        return class_names(self.dataset)


def unlabeled_images(
    spec: str, data_dir: str | None, model: nn.Module, count: int, split: str = "train", seed: int = 0
) -> Tensor:
    """Random images of a split, prepared for evaluation; for calibration, which needs no labels.

    Returns:
        ``[count, C, H, W]``, fewer where the split has fewer.
    """
    config = DataConfig.of(model)
    dataset = open_dataset(spec, data_dir, split, config.input_size[0])
    return torch.cat(list(plain_batches(dataset, config, count, seed, 128)))


def plain_batches(dataset: ImageSource, config: DataConfig, count: int, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of ``count`` images without augmentation: random ones, or the first of a streamed data set."""
    if not isinstance(dataset, IterableDataset):
        dataset = subset(dataset, count, seed)
    loader = make_loader(dataset, evaluation_transform(config), batch_size, 0, training=False)
    batches = -(-min(count, len(dataset)) // batch_size)
    for images, _ in islice(loader, batches):
        yield images
