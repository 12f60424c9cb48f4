"""Prepare a model and its images for forward passes: evaluation mode, device and dtype, batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode inside the context; restore the mode of every module on exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            if type(module).train is not nn.Module.train:
                module.train(mode)  # may do more, as in FeatureGraphNet, which has a graph for each mode
        for module, mode in modes.items():
            module.training = mode


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first parameter, fp32 for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU for a model without any."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def move_like(batch: Tensor, model: nn.Module) -> Tensor:
    """Move a batch to the model's device and dtype."""
    return batch.to(device_of(model), model_dtype(model))


def batches_of(images: Tensor | Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """Cut images ``[N, C, H, W]``, or a sequence of batches, into CPU batches of nearly equal size.

    A last batch of a single image would upset a BatchNorm on the logits.
    """
    if not isinstance(images, Tensor):
        parts = [batch.cpu() for batch in images]
        images = torch.cat(parts) if parts else torch.empty(0)
    return list(images.tensor_split(max(1, -(-len(images) // batch_size))))
