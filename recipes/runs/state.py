"""The state of a run: with accelerate's own state, enough to resume as if the run had never stopped."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ...convert.errors import RecipeError
from ...convert.files import read_json_object, write_json
from .layer_scales import LayerScales, is_sample

COLUMNS = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")  # as timm's summary.csv
AVERAGE_COLUMNS = ("eval_loss_ema", "eval_top1_ema", "eval_top5_ema")  # where a moving average is evaluated too
TERM_PREFIX = "train_"  # with a term's name, the column of its mean, where the loss has several terms
Row = dict[str, float]


@dataclasses.dataclass
class RunState:
    """A place between two optimizer steps.

    Args:
        epoch: The epoch that is being trained, from 0.
        batches_done: Batches of it that each process has done; always whole accumulation windows.
        losses: Sums over this process's images of the epoch so far: ``"loss"``, and each term by its name.
        images: Number of those images.
        lr: Learning rate of the last step.
        skipped: Steps of the whole run that were skipped since loss or gradient was not finite.
        skipped_in_a_row: Number of those since the last step that was taken.
        images_per_second: Training images per second of the epoch, all processes together; ``None`` before a step.
        rows: Rows of ``summary.csv``, one a finished epoch.
        layer_scales: Samples of ``layers.csv``, one for each epoch in which a step was taken.
    """

    epoch: int = 0
    batches_done: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    images: int = 0
    lr: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    images_per_second: float | None = None
    rows: list[Row] = dataclasses.field(default_factory=list)
    layer_scales: list[LayerScales] = dataclasses.field(default_factory=list)

    def next_epoch(self, row: Row) -> None:
        """Finish the epoch with its row."""
        self.rows = [*self.rows, row]
        self.epoch += 1
        self.batches_done, self.images, self.losses = 0, 0, dict.fromkeys(self.losses, 0.0)

    def mean_losses(self) -> dict[str, float]:
        """Return this process's mean losses of the epoch so far."""
        return {name: value / max(1, self.images) for name, value in self.losses.items()}


def gather_sums(state: RunState, accelerator: Accelerator) -> list[dict[str, float]]:
    """Return ``losses`` and ``images`` of every process; called on all of them."""
    names = (*state.losses, "images")
    own = torch.tensor([[*state.losses.values(), state.images]], dtype=torch.float64, device=_fp64_device(accelerator))
    return [dict(zip(names, values, strict=True)) for values in accelerator.gather(own).tolist()]


def mean_losses(sums: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean losses over the images of all processes; NaN where there was no image."""
    total = {name: sum(each[name] for each in sums) for name in sums[0]}
    images = total.pop("images")
    return {name: value / images if images else float("nan") for name, value in total.items()}


def loss_columns(means: Mapping[str, float]) -> Row:
    """Return the columns of ``summary.csv`` for the means of the terms."""
    return {f"{TERM_PREFIX}{name}": value for name, value in means.items() if name != "loss"}


def _fp64_device(accelerator: Accelerator) -> torch.device:
    """Apple's GPU has no fp64."""
    device: torch.device = accelerator.device
    return torch.device("cpu") if device.type == "mps" else device


def write_state(path: Path, state: RunState, sums: list[dict[str, float]]) -> None:
    """Write a state with the sums of all processes."""
    shared = {key: value for key, value in dataclasses.asdict(state).items() if key not in ("losses", "images")}
    write_json(path, {**shared, "sums": sums})


def read_state(path: Path, accelerator: Accelerator) -> RunState:
    """Read what ``write_state`` wrote; each process gets its own sums, or the first those of all if others wrote it.

    With another number of processes, a step must have as many batches as before, all processes together.

    Raises:
        RecipeError: The file is damaged.
    """
    values = read_json_object(path)
    sums, rows, scales = values.pop("sums", None), values.get("rows"), values.get("layer_scales")
    counts = {"epoch", "batches_done", "skipped", "skipped_in_a_row"}
    if (
        set(values) != counts | {"lr", "images_per_second", "rows", "layer_scales"}
        or not all(type(values[name]) is int and values[name] >= 0 for name in counts)
        or not _is_number(values["lr"])
        or not (values["images_per_second"] is None or _is_number(values["images_per_second"]))
        or not isinstance(rows, list)
        or not all(map(_is_row, rows))
        or not isinstance(scales, list)
        or not all(map(is_sample, scales))
        or not isinstance(sums, list)
        or not sums
        or not all(isinstance(each, dict) and "images" in each and each.keys() == sums[0].keys() for each in sums)
        or not all(_is_number(value) for each in sums for value in each.values())
    ):
        raise RecipeError(f"{path} is damaged: expected a run state with rows of {', '.join(COLUMNS)}")
    processes = accelerator.num_processes
    window = accelerator.gradient_accumulation_steps
    if len(sums) != processes:
        steps = math.ceil(values["batches_done"] * len(sums) / (processes * window))
        values["batches_done"] = steps * window
        sums = [{name: sum(each[name] for each in sums) for name in sums[0]}]
        sums += [dict.fromkeys(sums[0], 0)] * (processes - 1)
    own = {name: float(value) for name, value in sums[accelerator.process_index].items()}
    images = int(own.pop("images"))
    return RunState(**values, losses=own, images=images)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not set(COLUMNS) <= set(row) or not all(map(_is_number, row.values())):
        return False
    return all(name.startswith(TERM_PREFIX) for name in set(row) - set(COLUMNS) - set(AVERAGE_COLUMNS))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
