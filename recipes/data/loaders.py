"""Transforms and data loaders for training, evaluation and calibration."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from ..configs.recipe import Augmentation
from .datasets import DataConfig, ImageSource, class_names, open_dataset, subset, with_labels
from .labels import compare_unlabeled, no_label
from .reproducible import EpochImages, EpochOrder, EpochStream
from .workers import ignore_first_signal, loader_workers

Transform = Callable[[Any], Any]


class Transformed(Dataset[tuple[Any, int]]):
    """A data set with a transform applied to each image; the data set itself is not changed.

    Args:
        dataset: Data set of ``(image, class index)``.
        transform: Function of an image.
    """

    def __init__(self, dataset: ImageSource, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return self.transform(image), target


def evaluation_transform(config: DataConfig) -> Transform:
    """Return timm's evaluation transform: resize, center crop, tensor, normalize."""
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
    """Return timm's training transform, or random crops of the padded image if ``crop_padding`` is set."""
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
    """Build a loader of ``(images [N, C, H, W], targets [N])``.

    A training loader drops a partial last batch. Its order and augmentation follow from ``seed`` and the epoch:
    accelerate's ``set_epoch`` sets the epoch of the order, ``EpochImages.set_epoch`` that of the augmentation.

    Args:
        dataset: Opened data set; the reader of a streamed one is configured for this loader.
        transform: Function applied to each image.
        batch_size: Images per batch.
        workers: Number of loader processes, at most one per processor.
        training: Shuffle, and drop a partial last batch.
        seed: Seed of the order and the augmentation.
    """
    workers = loader_workers(workers)
    images: Dataset[Any]
    order = None
    if isinstance(dataset, IterableDataset):
        images = _stream(dataset, transform, batch_size, workers, training=training, seed=seed)
    else:
        images = Transformed(dataset, transform)
        if training:
            images, order = EpochImages(images, seed), EpochOrder(len(dataset), seed)
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=order,
        drop_last=training and order is not None and len(dataset) > batch_size,
        num_workers=workers,
        worker_init_fn=ignore_first_signal,
        persistent_workers=False,  # workers learn the epoch when they start
        pin_memory=torch.cuda.is_available(),
    )


def _stream(
    dataset: Any, transform: Transform, batch_size: int, workers: int, *, training: bool, seed: int
) -> EpochStream:
    """Configure a streamed data set's reader as timm does; the reader shuffles, and fills each worker's last batch.

    For training, each process reads its own shards. For evaluation, the reader covers all shards, because their images
    do not divide evenly among processes; accelerate distributes the batches.
    """
    reader = dataset.reader
    reader.batch_size, reader.common_seed = batch_size, seed
    if not training:
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    dataset.set_loader_cfg(num_workers=workers)
    return EpochStream(dataset, transform, seed)


def unlabeled_images(
    spec: str, data_dir: str | None, model: nn.Module, count: int, split: str = "train", seed: int = 0
) -> Tensor:
    """Return random images of a split, prepared as for evaluation; for calibration, which needs no labels.

    A model without class names records those of the data set, see ``compare_unlabeled``.

    Args:
        spec: Data set name, as for ``open_dataset``.
        data_dir: Folder with the data set's files, or ``None``.
        model: Model that the images are prepared for.
        count: Number of images.
        split: Split to take them from.
        seed: Seed of the choice.

    Returns:
        Images ``[count, C, H, W]``, fewer if the split has fewer.
    """
    config = DataConfig.of(model)
    dataset = open_dataset(spec, data_dir, split, config.input_size[0], training=True)
    compare_unlabeled(class_names(dataset), model, f"{spec}, split {split!r},")
    dataset = with_labels(dataset, no_label)
    return torch.cat(list(plain_batches(dataset, config, count, seed, 128)))


def plain_batches(dataset: ImageSource, config: DataConfig, count: int, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Yield ``count`` images without augmentation in batches: random images, or the first ones of a streamed data set.

    Args:
        dataset: Opened data set.
        config: Image preparation of the model.
        count: Number of images; all of them if the data set has fewer.
        seed: Seed of the choice.
        batch_size: Images per batch.

    Yields:
        Images ``[N, C, H, W]``.
    """
    if not isinstance(dataset, IterableDataset):
        dataset = subset(dataset, count, seed)
    loader = make_loader(dataset, evaluation_transform(config), batch_size, 0, training=False)
    batches = -(-min(count, len(dataset)) // batch_size)
    for images, _ in islice(loader, batches):
        yield images
