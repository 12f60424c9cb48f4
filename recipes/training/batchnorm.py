"""BatchNorm statistics in a run: re-estimated before evaluation and saving, restored after a skipped step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.utils import distribute_bn
from torch import nn

from ...convert.calibration.batchnorm import batch_norms, reestimate_batchnorm_
from ..data.datasets import DataConfig
from ..data.loaders import plain_batches
from ..distributed.sync_batchnorm import each_process_alone
from .prepare import Run


class BatchNormSnapshot:
    """Running statistics from before a step: its forward pass has changed them when the step is found to be bad.

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
        """Put back the statistics that were kept last."""
        _copy(self._buffers, self._kept)


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def refresh_batchnorm(run: Run, model: nn.Module, *, reduce: bool = True) -> None:
    """Re-estimate an adder network's statistics before evaluation and saving, and make all processes agree.

    Args:
        run: It has the images to estimate on.
        model: The model in training, or its moving average.
        reduce: Take the mean over processes; else those of the first, which are what its saved state continues from.
    """
    recipe = run.recipe
    if run.norm_images is not None:
        config = DataConfig.of(model)
        batches = plain_batches(run.norm_images, config, recipe.bn_images, recipe.seed, recipe.batch_size)
        with each_process_alone(model):
            reestimate_batchnorm_(model, batches)
    if run.accelerator.num_processes > 1:
        distribute_bn(model, run.accelerator.num_processes, reduce=reduce)


@contextmanager
def as_evaluated(run: Run) -> Iterator[None]:
    """Give BatchNorm the statistics of an evaluation inside the context, and restore them afterwards."""
    before = BatchNormSnapshot(run.bare_model)
    refresh_batchnorm(run, run.bare_model)
    try:
        yield
    finally:
        before.restore()
