"""Prepare a model and its images for forward passes: evaluation mode, device and dtype, batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
            module.training = mode


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first parameter, fp32 for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def move_like(batch: Tensor, model: nn.Module) -> Tensor:
    """Move a batch to the model's device and dtype. A model without parameters leaves the device as it is."""
    parameter = next(model.parameters(), None)
    return batch.to(batch.device if parameter is None else parameter.device, model_dtype(model))


def batches_of(images: Tensor | Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """Cut images ``[N, C, H, W]``, or a sequence of batches, into CPU batches of nearly equal size.

    A last batch of a single image would upset a BatchNorm on the logits.
    """
    if not isinstance(images, Tensor):
        parts = [batch.cpu() for batch in images]
        images = torch.cat(parts) if parts else torch.empty(0)
    return list(images.tensor_split(max(1, -(-len(images) // batch_size))))
