"""Mixup and cutmix: training on blends of two images, and of their labels."""

from timm.data import Mixup
from torch import Tensor, nn

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from .datasets import ImageSource


class Mixing:
    """timm's mixup and cutmix, as a recipe says; random by NumPy's generator.

    Smoothing stays with the loss: smoothing a blend of labels is blending smoothed labels.

    Args:
        recipe: The settings, and the epoch to end with.
        model: Tells the number of classes.
        images: The training images.

    Raises:
        RecipeError: The data set is one batch with an odd number of images: one would have no partner.
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
        """A batch mixed, in place.

        Args:
            epoch: From 0.
            images: ``[N, C, H, W]``, N even.
            targets: Labels ``[N]``.

        Returns:
            The images and the share of each class ``[N, classes]``; both as they came where nothing is to be mixed.
        """
        if self._mixup is None or epoch >= self.end:
            return images, targets
        mixed: tuple[Tensor, Tensor] = self._mixup(images, targets)
        return mixed
