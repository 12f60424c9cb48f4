"""BatchNorm over the joint batch of all processes, by class assignment to torch's ``SyncBatchNorm``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_UNSUPPORTED_DEVICES = {"cpu", "mps"}  # torch has no kernels for SyncBatchNorm there


class SyncedBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that can be told to use only this process's batch.

    A BatchNorm becomes one by class assignment (``synchronize_batchnorm_``), so parameters, buffers and names in a
    checkpoint stay the same.
    """

    process_group: Any = None  # all processes
    alone = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``[N, C, …]``; in training mode to be called on all processes, unless ``alone`` is set."""
        return _BATCH_NORM.forward(self, input) if self.alone else super().forward(input)


class SyncedBatchNormAct(SyncedBatchNorm):
    """``SyncedBatchNorm`` followed by the dropout and activation of timm's ``BatchNormAct2d``."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize and activate ``[N, C, …]``."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


_SYNCED: dict[type[nn.Module], type[_BATCH_NORM]] = {
    nn.BatchNorm1d: SyncedBatchNorm,
    nn.BatchNorm2d: SyncedBatchNorm,
    nn.BatchNorm3d: SyncedBatchNorm,
    BatchNormAct2d: SyncedBatchNormAct,
}


def check_sync_batchnorm(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse synchronized BatchNorm where torch does not support it.

    Raises:
        RecipeError: ``sync_bn`` is on with several processes that do not run on GPUs.
    """
    device = accelerator.device.type
    if recipe.sync_bn and accelerator.num_processes > 1 and device in _UNSUPPORTED_DEVICES:
        raise RecipeError(
            f"sync_bn is on with {accelerator.num_processes} processes on {device}, expected GPUs, the only devices on "
            "which torch synchronizes BatchNorm; turn it off with --set sync_bn=false"
        )


def synchronize_batchnorm_(model: nn.Module) -> None:
    """Make every BatchNorm of a model normalize the joint batch of all processes, in place.

    Raises:
        RecipeError: A BatchNorm is of a subclass whose computation is not known.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BATCH_NORM):
            if type(module) not in _SYNCED:
                raise RecipeError(
                    f"sync_bn is on, but {path} is a {type(module).__name__}, expected torch's BatchNorm or timm's "
                    "BatchNormAct2d; turn it off with --set sync_bn=false"
                )
            module.__class__ = _SYNCED[type(module)]


@contextmanager
def each_process_alone(model: nn.Module) -> Iterator[None]:
    """Make the synchronized BatchNorms of a model use only their own process's batch inside the ``with`` block."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, tuple(_SYNCED.values()))]
    for norm in norms:
        norm.alone = True
    try:
        yield
    finally:
        for norm in norms:
            norm.alone = False
