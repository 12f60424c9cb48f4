"""BatchNorm over calibration images is to do what the original's does with them, not what it did in training.

The statistics in the original are those of its training images. Calibration measures a converted network's over the
images it is given. Where those are few, or of another kind, plain measuring would change even a network in which
nothing was converted: EfficientNet-Lite0 with statistics measured over crops of twelve photographs names the same
class as before for 19 % of other crops. So inside ``calibration_statistics`` the factors and offsets of BatchNorm are
those with which statistics *of the calibration images* give what the original gives.
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
# Further apart, a channel is dead in one of the domains, and its factor should not explode.
_LARGEST_RATIO = 10.0


class ChannelShift(NamedTuple):
    """What a BatchNorm of the original receives for the calibration images, in units of its running statistics.

    ``ratio`` is that of the standard deviations, ``offset`` the difference of the means in running standard
    deviations; both ``[C]``.
    """

    ratio: Tensor
    offset: Tensor


@contextmanager
def calibration_statistics(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the student's BatchNorms are written for statistics of the calibration images, afterwards as before.

    Both ways of writing them are the same function to rounding, so nothing changes but what measuring statistics, or
    training with those of a batch, means. A BatchNorm of which the teacher has none of the same size stays as it is.

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
    kept = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm, _ in pairs]
    for norm, shift in pairs:
        _rewrite(norm, shift)
    inside = [(norm.weight.detach().clone(), norm.bias.detach().clone()) for norm, _ in pairs]
    try:
        yield
    finally:
        for (norm, shift), before, rewritten in zip(pairs, kept, inside, strict=True):
            untrained = torch.equal(norm.weight, rewritten[0]) and torch.equal(norm.bias, rewritten[1])
            _rewrite(norm, ChannelShift(1 / shift.ratio, -shift.offset / shift.ratio))
            if untrained:  # as it was, to the bit
                _copy(norm, before)


@torch.no_grad()
def _copy(norm: _BatchNorm, values: tuple[Tensor, Tensor]) -> None:
    norm.weight.copy_(values[0])
    norm.bias.copy_(values[1])


@torch.no_grad()
def measure_shifts(teacher: nn.Module, batches: Sequence[Tensor]) -> dict[str, ChannelShift]:
    """How the inputs of the teacher's BatchNorms differ from what they were trained on, by path.

    Means and variances are averaged over batches, as measuring a BatchNorm's statistics does.
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


def _shift(norm: _BatchNorm, found: list[tuple[int, Tensor, Tensor]]) -> ChannelShift:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    images = sum(count for count, _, _ in found)
    mean = torch.stack([count / images * mean for count, mean, _ in found]).sum(0)
    variance = torch.stack([count / images * variance for count, _, variance in found]).sum(0)
    deviation = (norm.running_var.float() + norm.eps).sqrt()
    ratio = (variance + norm.eps).sqrt() / deviation
    return ChannelShift(ratio.clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO), (mean - norm.running_mean.float()) / deviation)


@torch.no_grad()
def _rewrite(norm: _BatchNorm, shift: ChannelShift) -> None:
    """The same function with statistics that lie ``offset`` deviations further and are ``ratio`` times as wide."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    norm.running_mean.add_(shift.offset * deviation)
    norm.running_var.copy_(((deviation * shift.ratio).square() - norm.eps).clamp_min(0))
    norm.bias.add_(norm.weight * shift.offset)
    norm.weight.mul_(shift.ratio)
