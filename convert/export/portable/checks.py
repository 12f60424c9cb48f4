"""What is refused before anything is written."""

import torch
from torch import Tensor

from ....adder_layers.integer.check import check_plan
from ....adder_layers.integer.plan import IntegerPlan
from ...errors import ExportError


def check_exportable(plan: IntegerPlan) -> None:
    """Refuse a plan that does not fit together or could overflow.

    Raises:
        ExportError: It does; the message names the step.
    """
    try:
        check_plan(plan)
    except ValueError as error:
        raise ExportError(f"the network cannot be exported: {error}") from error


def check_images(what: str, images: Tensor, plan: IntegerPlan) -> None:
    """Refuse images that are not those of a plan.

    Args:
        what: How messages begin.
        images: ``[H, W, C]`` or ``[N, H, W, C]``, uint8.
        plan: The network.

    Raises:
        ExportError: Size or dtype are others, or there is none.
    """
    first = plan.activations[0]
    size = (first.height, first.width, first.channels)
    if images.dtype != torch.uint8 or images.shape[-3:] != size or len(images) == 0:
        wanted = ", ".join(map(str, ("N", *size)[4 - images.ndim :]))
        raise ExportError(f"{what} {list(images.shape)} {images.dtype}, expected [{wanted}] uint8")
