"""Where a run is: enough, beside accelerate's state, to go on as if it had never stopped."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...convert.errors import RecipeError
from ...convert.files import read_json_object, write_json
from .layer_scales import LayerScales, is_sample

COLUMNS = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")  # as timm's summary.csv
AVERAGE_COLUMNS = ("eval_loss_ema", "eval_top1_ema", "eval_top5_ema")  # where a moving average is evaluated too
Row = dict[str, float]


@dataclasses.dataclass
class RunState:
    """A place between two optimizer steps.

    Args:
        epoch: The epoch that is being trained, from 0.
        batches: Batches of it that each process has done; always whole accumulation windows.
        loss: Sum of this process's training losses over the images of the epoch so far.
        images: Number of those images.
        lr: Learning rate of the last step.
        skipped: Steps of the whole run that were skipped since loss or gradient was not finite.
        skipped_in_a_row: Number of those since the last step that was taken.
        rows: Of ``summary.csv``, one a finished epoch.
        scales: Of ``layers.csv``, one an epoch of which a step was taken.
    """

    epoch: int = 0
    batches: int = 0
    loss: float = 0.0
    images: int = 0
    lr: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rows: list[Row] = dataclasses.field(default_factory=list)
    scales: list[LayerScales] = dataclasses.field(default_factory=list)

    def next_epoch(self, row: Row) -> None:
        """Finish the epoch with its row."""
        self.rows = [*self.rows, row]
        self.epoch += 1
        self.batches, self.images, self.loss = 0, 0, 0.0


def gather_sums(position: RunState, accelerator: Accelerator) -> list[list[float]]:
    """``[loss, images]`` of every process; called on all of them."""
    sums = torch.tensor([[position.loss, position.images]], dtype=torch.float64, device=_wide_device(accelerator))
    gathered: list[list[float]] = accelerator.gather(sums).tolist()
    return gathered


def _wide_device(accelerator: Accelerator) -> torch.device:
    """Where fp64 can be: Apple's GPU has none."""
    device: torch.device = accelerator.device
    return torch.device("cpu") if device.type == "mps" else device


def write_state(path: Path, position: RunState, sums: list[list[float]]) -> None:
    """Write a position with the sums of all processes."""
    shared = {key: value for key, value in dataclasses.asdict(position).items() if key not in ("loss", "images")}
    write_json(path, {**shared, "sums": sums})


def read_state(path: Path, accelerator: Accelerator) -> RunState:
    """Read what ``write_state`` wrote; each process gets its own sums.

    Raises:
        RecipeError: The file is damaged, or the run had another number of processes.
    """
    values = read_json_object(path)
    sums, rows, scales = values.pop("sums", None), values.get("rows"), values.get("scales")
    counts = {"epoch", "batches", "skipped", "skipped_in_a_row"}
    if (
        set(values) != counts | {"lr", "rows", "scales"}
        or not all(type(values[name]) is int and values[name] >= 0 for name in counts)
        or not _is_number(values["lr"])
        or not isinstance(rows, list)
        or not all(map(_is_row, rows))
        or not isinstance(scales, list)
        or not all(map(is_sample, scales))
        or not isinstance(sums, list)
        or not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) for pair in sums)
    ):
        raise RecipeError(f"{path} is damaged: expected a position with rows of {', '.join(COLUMNS)}")
    processes = accelerator.num_processes
    if len(sums) != processes:
        raise RecipeError(
            f"the run had {len(sums)} processes, and there are {processes} now; resume it with "
            f"--num-processes {len(sums)}, since the batch of a step depends on it"
        )
    loss, images = sums[accelerator.process_index]
    return RunState(**values, loss=float(loss), images=int(images))


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict) and set(row) - set(AVERAGE_COLUMNS) == set(COLUMNS) and all(map(_is_number, row.values()))
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
