"""The scale of each layer's weights and gradients, once per epoch: it shows where a deep network stops learning.

AdderNet's gradients differ between layers by orders of magnitude, which the adaptive rate is there to even out
(arXiv 1912.13200, section 3.3).
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ...convert.conversion.targets import converted_layers
from ...convert.files import write_text
from ..distributed.sharding import full_tensor

SCALE_COLUMNS = ("epoch", "layer", "weight_rms", "gradient_norm")


class LayerScales(TypedDict):
    """One epoch's sample: the root mean square of each layer's weights, and the norm of their gradient."""

    epoch: int
    weight_rms: list[float]
    gradient_norm: list[float]


def watched_layers(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Return the layers that are sampled, in the model's order: converted layers, or a CNN's convolutions."""
    return converted_layers(model) or {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)
    }


@torch.no_grad()
def measure(model: nn.Module, epoch: int) -> LayerScales:
    """Sample a model whose gradients are those of a whole step.

    Args:
        model: The model without wrappers. A layer without a gradient counts as having one of 0.
        epoch: Number of the epoch, for the sample.
    """
    layers = watched_layers(model).values()
    rms = [_norm(layer.weight) / layer.weight.numel() ** 0.5 for layer in layers]
    norms = [torch.zeros_like(size) if layer.weight.grad is None else _norm(layer.weight.grad)
             for layer, size in zip(layers, rms, strict=True)]  # fmt: skip
    values = torch.stack([*rms, *norms]).tolist() if rms else []  # one transfer from the device
    return {"epoch": epoch, "weight_rms": values[: len(rms)], "gradient_norm": values[len(rms) :]}


def _norm(values: Tensor) -> Tensor:
    return full_tensor(torch.linalg.vector_norm(values.float()))


def is_sample(value: Any) -> bool:
    """Return whether a value from a file is a sample."""
    if not isinstance(value, dict) or set(value) != set(LayerScales.__annotations__) or type(value["epoch"]) is not int:
        return False
    lists = value["weight_rms"], value["gradient_norm"]
    if not all(isinstance(numbers, list) and all(type(each) is float for each in numbers) for numbers in lists):
        return False
    return len(lists[0]) == len(lists[1])


def write_scales(target: Path, layers: Sequence[str], samples: Sequence[LayerScales]) -> None:
    """Write all samples as a CSV with a row for each epoch and layer."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(SCALE_COLUMNS)
    for sample in samples:
        for row in zip(layers, sample["weight_rms"], sample["gradient_norm"], strict=True):
            writer.writerow([sample["epoch"], *row])
    write_text(target, buffer.getvalue())
