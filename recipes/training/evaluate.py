"""Evaluation: top-1, top-5 and loss over a split, across processes."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...convert.graph.modes import eval_mode
from ..runs.progress import ProgressBar


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Result of an evaluation.

    Args:
        top1: Percentage of images whose label is the best prediction.
        top5: Percentage of images whose label is among the best five predictions.
        loss: Mean cross-entropy.
        images: Number of images.
        images_per_second: Throughput of the whole loop.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any] | Iterable[Any],
    accelerator: Accelerator,
    title: str = "evaluating",
    note: Callable[[str], None] | None = None,
) -> Metrics:
    """Evaluate a model on a loader; images that are repeated to even out processes count once.

    Args:
        model: The model as accelerate prepared it, in any mode, which it keeps.
        loader: Loader of ``(images, targets)``, as accelerate prepared it.
        accelerator: Accelerator of the run.
        title: Title of the progress bar.
        note: Called with each line of progress.

    Returns:
        The same metrics on every process.
    """
    right = torch.zeros(3, dtype=torch.float64)  # top-1, top-5, loss
    images = 0
    started = time.perf_counter()
    bar = ProgressBar(title, _length(loader), accelerator.is_main_process, note=note)
    with eval_mode(model), bar:
        for batch, targets in loader:
            with accelerator.autocast():
                logits = model(batch)
            logits, targets = accelerator.gather_for_metrics((logits, targets))
            right += _batch_sums(logits.float(), targets).cpu()
            images += len(targets)
            bar.step(lambda: f"top-1 {100 * right[0] / images:.2f}")  # noqa: B023 - called at once
    seconds = time.perf_counter() - started
    top1, top5, loss = (right / max(1, images)).tolist()
    return Metrics(100 * top1, 100 * top5, loss, images, images / seconds)


def _batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the number of images right in top-1 and in top-5, and the summed loss: ``[3]`` in fp64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([best[:, 0].sum().double(), best.any(1).sum().double(), loss.double()])


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # a streamed data set
        return 0
