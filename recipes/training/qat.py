"""Training with quantization: before the first step the model becomes one that computes as in integers."""

from torch import nn

from ...convert.calibration.calibrate import batches_of
from ...convert.errors import RecipeError
from ...convert.quantization.config import QuantizeConfig
from ...convert.quantization.fake_quantize import FakeQuantized
from ...convert.quantization.quantize import prepare_
from ..configs.recipe import Recipe
from ..data.datasets import unlabeled_images

_IMAGES = 256


def imitate_integers_(model: nn.Module, recipe: Recipe) -> None:
    """Choose ranges on training images and change the model, in place, as the recipe's ``bits`` ask; it is recorded.

    The ranges stay fixed: BatchNorm, which trains, scales what goes into them.

    Raises:
        AdderkitError: Integers cannot express the model.
        RecipeError: It is trained for other integers already.
    """
    config = QuantizeConfig(recipe.bits, recipe.requant)  # type: ignore[arg-type]  # checked by the recipe
    if isinstance(model, FakeQuantized):
        if model._quantize_config != config:
            raise RecipeError(
                f"bits is {recipe.bits} and requant {recipe.requant}, expected {model._quantize_config.bits} and "
                f"{model._quantize_config.requant} as the model was trained with; train its float network anew"
            )
        return
    images = unlabeled_images(recipe.dataset, recipe.data_dir, model, _IMAGES, recipe.train_split, recipe.seed)
    prepare_(model.eval(), batches_of(images, 64), config)
