"""BatchNorm statistics of each process, so that a stopped run continues with those that each process had.

A process updates the statistics from its own batches. DDP sends those of the main process to all before each forward
pass, but FSDP2 never does, and after an epoch the mean over all processes is taken.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...convert.calibration.batchnorm import batch_norms
from ...convert.files import atomic_path

_FILE = "process_statistics.safetensors"
_KEY = "statistics"


def keep_process_statistics(accelerator: Accelerator, model: nn.Module) -> None:
    """Make accelerate's saves hold the statistics of each process.

    Args:
        accelerator: Accelerator of the run.
        model: The model in training, without wrappers.
    """
    if accelerator.num_processes == 1 or not _buffers(model):
        return

    def write(models: list[Any], weights: list[Any], folder: str) -> None:
        own = torch.cat([buffer.double().flatten() for buffer in _buffers(model)])
        gathered: Tensor = accelerator.gather(own[None])
        if accelerator.is_main_process:
            with atomic_path(Path(folder) / _FILE) as temporary:
                save_file({_KEY: gathered.cpu()}, temporary)

    accelerator.register_save_state_pre_hook(write)


@torch.no_grad()
def restore_process_statistics(accelerator: Accelerator, model: nn.Module, state: Path) -> None:
    """Give this process the statistics that it had; with another number of processes it keeps those of the model.

    Args:
        accelerator: Accelerator of the run, which has restored the model.
        model: The model in training, without wrappers.
        state: The folder that accelerate restored from.
    """
    path = state / _FILE
    if not path.exists():
        return
    rows = load_file(path)[_KEY]
    if len(rows) != accelerator.num_processes:
        return
    buffers = _buffers(model)
    parts = rows[accelerator.process_index].split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view(buffer.shape))


def _buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for norm in batch_norms(model) for buffer in norm.buffers()]
