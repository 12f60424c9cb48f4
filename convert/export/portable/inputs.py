"""Inputs of an export: a valid plan, images that it reads, and the normalization of their pixels."""

import dataclasses

import torch
from torch import Tensor

from ....adder_layers.integer.check import check_plan
from ....adder_layers.integer.plan import IntegerPlan
from ...errors import ExportError


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Real value ``(pixel / 255 - mean[c]) / std[c]`` of a pixel from 0 to 255, which a plan does not know.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_inputs(plan: IntegerPlan, subject: str, images: Tensor) -> None:
    """Reject an invalid plan, and images that do not match it.

    Args:
        plan: The network.
        subject: Subject and verb of the message about images.
        images: ``[H, W, C]`` or ``[N, H, W, C]``, uint8.

    Raises:
        ExportError: The plan is inconsistent or could overflow (the message names the step), the size or dtype of the
            images differs, or there are no images.
    """
    try:
        check_plan(plan)
    except ValueError as error:
        raise ExportError(f"the network cannot be exported: {error}") from error
    first = plan.activations[0]
    size = (first.height, first.width, first.channels)
    if images.dtype != torch.uint8 or images.shape[-3:] != size or len(images) == 0:
        wanted = ", ".join(map(str, ("N", *size)[4 - images.ndim :]))
        raise ExportError(f"{subject} {list(images.shape)} {images.dtype}, expected [{wanted}] uint8")
