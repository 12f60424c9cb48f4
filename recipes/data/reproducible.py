"""Randomness that follows from where a run is, not from what it did before, so that a resumed run goes on exactly.

Every image's augmentation follows from (seed, epoch, image), every batch's dropout from (seed, epoch, batch, process),
and the order of images from (seed, epoch). Neither the number of loader processes nor a stop changes any of them, and
two processes draw the augmentations that one would.
"""

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch, all its devices, from a few whole numbers such as (seed, epoch, batch, process)."""
    torch.manual_seed(_seed_cpu(*key))


def _seed_cpu(*key: int) -> int:
    # SeedSequence spreads neighboring keys far apart; the generators' own seeding would not.
    words = np.random.SeedSequence(key).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    seed: int = words[1] << 32 | words[2]
    torch.default_generator.manual_seed(seed)
    return seed


class EpochImages(Dataset[Any]):
    """A data set whose image number i looks the same in epoch e of every run with the same seed.

    Args:
        dataset: Holds ``(image, class index)``; its transform may be random.
        seed: Of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Look as in that epoch; before loader processes start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        _seed_cpu(self.seed, self.epoch, index)
        item: tuple[Any, int] = self.dataset[index]
        return item


class EpochStream(IterableDataset[Any]):
    """A streamed data set that is the same in epoch e of every run with the same seed, processes and workers.

    Every epoch is read by a reader of its own, since timm's goes on shuffling from where the last epoch left it.

    Args:
        dataset: timm's ``IterableImageDataset``; its reader deals shards out among processes and loader workers, and
            its transform may be random.
        seed: Of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    @property
    def images(self) -> int:
        """Of all processes together, each counted once."""
        count: int = self.dataset.reader.num_samples
        return count

    def set_epoch(self, epoch: int) -> None:
        """Read as in that epoch; before loader processes start."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        reader = copy.copy(self.dataset.reader)
        key = (self.seed, self.epoch, reader.dist_rank, worker.id if worker else 0)
        reader.worker_seed = random.Random(str(key)).getrandbits(32)  # workers have one of torch's instead
        for index, (image, target) in enumerate(reader):
            _seed_cpu(*key, index)
            yield self.dataset.transform(image), target


class EpochOrder(Sampler[int]):
    """A random order that follows from (seed, epoch).

    accelerate's ``SeedableRandomSampler`` does the same, but is saved with the whole list of images at every save.

    Args:
        length: Number of images.
        seed: Of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of that epoch; accelerate's loader calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch))))
        return iter(order.permutation(self.length).tolist())
