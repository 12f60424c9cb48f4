"""The moving average of the weights in training, which often evaluates better than the weights themselves."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from ...convert.files import atomic_path
from ..configs.recipe import Recipe

_FILE = "model_ema.safetensors"


def make_average(recipe: Recipe, accelerator: Accelerator, model: nn.Module) -> ModelEmaV3 | None:
    """Make an average that begins with the model's weights and that the accelerator saves and restores.

    Args:
        recipe: Whether there is an average, and its decay.
        accelerator: Accelerator of the run.
        model: The model on its device, without wrappers.

    Returns:
        timm's ``ModelEmaV3``, or ``None`` where the recipe wants none.
    """
    if not recipe.model_ema:
        return None
    average = ModelEmaV3(model, decay=recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)

    def write(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            tensors = {name: value.cpu().contiguous().clone() for name, value in average.module.state_dict().items()}
            with atomic_path(Path(folder) / _FILE) as temporary:
                save_file(tensors, temporary)

    def read(models: list[Any], folder: str) -> None:
        average.module.load_state_dict(load_file(Path(folder) / _FILE))

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)
    return average
