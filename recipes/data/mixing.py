"""Mixup and CutMix: training on blends of two images and of their labels."""

from timm.data import Mixup
from torch import Tensor, nn

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from .datasets import ImageSource


class Mixing:
    """timm's mixup and CutMix configured by a recipe, drawing random numbers from NumPy's global generator.

    Label smoothing is left to the loss: smoothing a blend of labels equals blending smoothed labels.

    Args:
        recipe: Mixing settings, including the epoch at which mixing ends.
        model: Model in training; gives the number of classes.
        images: Training images.

    Raises:
        RecipeError: The data set is a single batch with an odd number of images, so that one would have no partner.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, images: ImageSource) -> None:
        self.end = recipe.mixup_off_epoch or recipe.epochs
        self._mixup: Mixup | None = None
        if not recipe.mixes:
            return
        if len(images) <= recipe.batch_size and len(images) % 2:
            raise RecipeError(
                f"the only batch has {len(images)} images, expected an even number with mixup or cutmix; "
                f"set batch_size (now {recipe.batch_size}) to an even number below it"
            )
        self._mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            mode=recipe.mixup_mode,
            label_smoothing=0.0,
            num_classes=model.num_classes,
        )

    def __call__(self, epoch: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            epoch: Current epoch, counted from 0.
            images: Images ``[N, C, H, W]``, N even.
            targets: Class indices ``[N]``.

        Returns:
            The images and the class proportions ``[N, classes]``; images and class indices unchanged if this epoch
            or recipe does not mix.
        """
        if self._mixup is None or epoch >= self.end:
            return images, targets
        mixed: tuple[Tensor, Tensor] = self._mixup(images, targets)
        return mixed
