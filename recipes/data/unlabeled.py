"""Choice of unlabeled training images, as calibration, pruning and quantization use them."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class UnlabeledImages:
    """Images of a data set's training split, without their labels.

    Args:
        dataset: Name of the data set.
        data_dir: Folder with its files.
        count: Number of images.
        seed: Seed of the choice.
        split: Name of the training split.
    """

    dataset: str
    data_dir: str | None = None
    count: int = 512
    seed: int = 0
    split: str = "train"

    def load(self, model: "nn.Module") -> "Tensor":
        """Return a random sample of the images, prepared as the model expects: ``[N, C, H, W]``.

        ``N`` is less than ``count`` if the split has fewer images.

        Raises:
            DatasetError: The data set cannot be opened.
        """
        from .loaders import unlabeled_images

        return unlabeled_images(self.dataset, self.data_dir, model, self.count, self.split, self.seed)

    def __str__(self) -> str:
        return f"{self.count} unlabeled images of {self.dataset}"
