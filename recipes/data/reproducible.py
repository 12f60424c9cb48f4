"""Randomness derived from the position in a run, not from earlier random draws, so that a run resumes exactly.

An image's augmentation follows from (seed, epoch, image), a batch's dropout from (seed, epoch, batch, process), and the
order of images from (seed, epoch). Neither the number of loader processes nor an interruption changes any of them, and
two processes draw the same augmentations as one.
"""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (all devices) from a few integers such as (seed, epoch, batch, process)."""
    torch.manual_seed(_seed_cpu(*key))


def _seed_cpu(*key: int) -> int:
    # SeedSequence maps neighboring keys to unrelated seeds; the generators' own seeding does not.
    words = np.random.SeedSequence(key).generate_state(3, np.uint32).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    seed: int = words[1] << 32 | words[2]
    torch.default_generator.manual_seed(seed)
    return seed


class EpochImages(Dataset[Any]):
    """A data set whose augmentation of image i in epoch e is the same in every run with the same seed.

    Args:
        dataset: Data set of ``(image, class index)`` with a random transform.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; to be called before loader processes start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        _seed_cpu(self.seed, self.epoch, index)
        item: tuple[Any, int] = self.dataset[index]
        return item


class EpochStream(IterableDataset[Any]):
    """A streamed data set that is the same in epoch e of every run with the same seed, processes and workers.

    Each epoch is read with a copy of timm's reader, whose shuffling would otherwise continue from the previous epoch.

    Args:
        dataset: ``StreamedImages``, whose reader distributes shards among processes and loader workers.
        transform: Function applied to each image; may be random.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    @property
    def images(self) -> int:
        """Number of images in the split, for all processes together."""
        count: int = self.dataset.reader.num_samples
        return count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; to be called before loader processes start."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        reader = copy.copy(self.dataset.reader)
        key = (self.seed, self.epoch, reader.dist_rank, worker.id if worker else 0)
        reader.worker_seed = random.Random(str(key)).getrandbits(32)  # loader workers use torch's worker seed
        for index, (image, target) in enumerate(self.dataset.read(reader)):
            _seed_cpu(*key, index)
            yield self.transform(image), target


class EpochOrder(Sampler[int]):
    """A random order of images that follows from (seed, epoch).

    accelerate's ``SeedableRandomSampler`` does the same, but every checkpoint would contain its whole list of images.

    Args:
        length: Number of images.
        seed: Seed of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate's loader calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, self.epoch))))
        return iter(order.permutation(self.length).tolist())
