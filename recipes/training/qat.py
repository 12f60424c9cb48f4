"""Quantization-aware training: before the first step the model becomes one that simulates an integer network."""

from torch import nn

from ...convert.errors import RecipeError
from ...convert.graph.modes import batches_of
from ...convert.quantization.config import QuantizeConfig
from ...convert.quantization.fake_quantize import FakeQuantized
from ...convert.quantization.quantize import prepare_
from ..configs.recipe import Recipe
from ..data.loaders import unlabeled_images

_IMAGES = 256


def prepare_qat_(model: nn.Module, recipe: Recipe) -> None:
    """Fake-quantize a model in place, with ranges that are chosen on training images.

    The ranges stay fixed during training: BatchNorm, which trains, scales the values that they are for.

    Args:
        model: The model. One that is fake-quantized already stays as it is.
        recipe: Bits other than 0, requantization, and the data set of the images.

    Raises:
        AdderkitError: Integers cannot express the model.
        RecipeError: The model is fake-quantized with other settings.
    """
    assert recipe.bits
    config = QuantizeConfig(recipe.bits, recipe.requant)
    if isinstance(model, FakeQuantized):
        if model.quantize_config != config:
            raise RecipeError(
                f"bits is {recipe.bits} and requant {recipe.requant}, expected {model.quantize_config.bits} and "
                f"{model.quantize_config.requant} as the model was trained with; train its float network for others"
            )
        return
    images = unlabeled_images(recipe.dataset, recipe.data_dir, model, _IMAGES, recipe.train_split, recipe.seed)
    prepare_(model.eval(), batches_of(images, 64), config)
