"""BatchNorm's statistics kept from steps that are skipped since their loss or gradient is not finite."""

import torch
from torch import nn

from ...convert.calibration.batchnorm import batch_norms


class BatchNormSnapshot:
    """Running statistics from before a step: its forward pass changed them already when the step is found bad.

    Args:
        model: The model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for norm in batch_norms(model) for buffer in norm.buffers()]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remember the statistics as they are."""
        _copy(self._kept, self._buffers)

    def restore(self) -> None:
        """Make them again what they were at ``keep``."""
        _copy(self._buffers, self._kept)


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
