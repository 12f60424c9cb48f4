"""Images brought to where a model is, in the precision that it computes in."""

import torch
from torch import Tensor, nn


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters, fp32 for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def placed(batch: Tensor, model: nn.Module) -> Tensor:
    """A batch on the model's device and in its dtype; on its own device for a model without parameters."""
    parameter = next(model.parameters(), None)
    return batch.to(batch.device if parameter is None else parameter.device, model_dtype(model))
