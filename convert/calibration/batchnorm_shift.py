"""Make BatchNorm re-estimation on calibration images reproduce the original network's BatchNorms.

The statistics of the original network are those of its training images; calibration re-estimates them on the images it
is given. If those are few, or of another kind, re-estimation alone would change even a network without converted
layers: EfficientNet-Lite0 with statistics re-estimated on crops of twelve photographs predicts the same class as before
for only 19 % of other crops. So inside ``calibration_statistics``, the weights and biases of BatchNorm are adapted to
statistics *of the calibration images*: together they compute what the original's BatchNorms compute.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph.hooks import hooked
from ..graph.modes import eval_mode, move_like
from .batchnorm import named_batch_norms

_BatchNorm = nn.modules.batchnorm._BatchNorm
# With a larger ratio, a channel is dead on one of the two sets of images, and its weight should not explode.
_LARGEST_RATIO = 10.0


class ChannelShift(NamedTuple):
    """Statistics of a BatchNorm's input on the calibration images, relative to its running statistics.

    Args:
        ratio: Ratio of the standard deviations, ``[C]``.
        offset: Difference of the means in running standard deviations, ``[C]``.
    """

    ratio: Tensor
    offset: Tensor


@contextmanager
def calibration_statistics(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> Iterator[None]:
    """Re-parameterize the student's BatchNorms for statistics of the calibration images inside the context.

    Both parameterizations compute the same function up to rounding; only the effect of re-estimating statistics, or of
    training with batch statistics, changes. BatchNorms without a counterpart of the same size in the teacher are left
    unchanged.

    Args:
        student: The converted model.
        teacher: The original network, with the same module paths.
        batches: The calibration images ``[n, C, H, W]``.
    """
    shifts = measure_shifts(teacher, batches)
    pairs = [
        (norm, ChannelShift(*(values.to(norm.running_mean) for values in shifts[path])))
        for path, norm in named_batch_norms(student).items()
        if path in shifts and norm.affine and norm.weight.shape == shifts[path].offset.shape
    ]
    original = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm, _ in pairs]
    for norm, shift in pairs:
        _reparameterize(norm, shift)
    inside = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm, _ in pairs]
    try:
        yield
    finally:
        for (norm, shift), before, rewritten in zip(pairs, original, inside, strict=True):
            untrained = torch.equal(norm.weight, rewritten[0]) and torch.equal(norm.bias, rewritten[1])
            _reparameterize(norm, ChannelShift(1 / shift.ratio, -shift.offset / shift.ratio))
            if untrained:  # restored bit by bit
                _copy(norm, before)


@torch.no_grad()
def _copy(norm: _BatchNorm, values: tuple[Tensor, Tensor]) -> None:
    norm.weight.copy_(values[0])
    norm.bias.copy_(values[1])


@torch.no_grad()
def measure_shifts(teacher: nn.Module, batches: Sequence[Tensor]) -> dict[str, ChannelShift]:
    """Measure how the inputs of the teacher's BatchNorms differ from those in its training, by path.

    Means and variances are averaged over batches, as in re-estimation of BatchNorm statistics.
    """
    norms = named_batch_norms(teacher)
    measured: dict[str, list[tuple[int, Tensor, Tensor]]] = {path: [] for path in norms}

    def measure(path: str, inputs: tuple[Any, ...]) -> None:
        values = inputs[0].float().transpose(0, 1).flatten(1)  # [C, N · H · W]
        measured[path].append((len(inputs[0]), values.mean(1), values.var(1)))

    with hooked(norms, pre=measure), eval_mode(teacher):
        for batch in batches:
            if len(batch) > 1:  # one value alone has no variance
                teacher(move_like(batch, teacher))
    return {path: _shift(norm, measured[path]) for path, norm in norms.items() if measured[path]}


def _shift(norm: _BatchNorm, measured: list[tuple[int, Tensor, Tensor]]) -> ChannelShift:
    """Average ``(images, mean, variance)`` of each batch and compare them with the running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    images = sum(count for count, _, _ in measured)
    mean = torch.stack([count / images * mean for count, mean, _ in measured]).sum(0)
    variance = torch.stack([count / images * variance for count, _, variance in measured]).sum(0)
    deviation = (norm.running_var.float() + norm.eps).sqrt()
    ratio = (variance + norm.eps).sqrt() / deviation
    return ChannelShift(ratio.clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO), (mean - norm.running_mean.float()) / deviation)


@torch.no_grad()
def _reparameterize(norm: _BatchNorm, shift: ChannelShift) -> None:
    """Shift a BatchNorm's statistics by ``offset`` deviations, scale them by ``ratio``, and compensate for both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    norm.running_mean.add_(shift.offset * deviation)
    norm.running_var.copy_(((deviation * shift.ratio).square() - norm.eps).clamp_min(0))
    norm.bias.add_(norm.weight * shift.offset)
    norm.weight.mul_(shift.ratio)
