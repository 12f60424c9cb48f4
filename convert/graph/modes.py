"""A model's mode, dtype and device: evaluation mode for a while, and batches moved to where the model is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode that it had, also after an error."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters, fp32 for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def move_like(batch: Tensor, model: nn.Module) -> Tensor:
    """A batch on the model's device and in its dtype; on its own device for a model without parameters."""
    parameter = next(model.parameters(), None)
    return batch.to(batch.device if parameter is None else parameter.device, model_dtype(model))
