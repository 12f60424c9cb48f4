"""Kernel distillation: compare features of student and teacher through kernels, stage by stage.

After progressive kernel-based distillation, PKKD (Xu et al., NeurIPS 2020, arXiv 2009.13044), where the teacher trains
alongside. The features of a CNN are distributed nearly like a Gaussian, those of an adder network nearly like a
Laplacian, so they are not compared directly: the teacher's pass through a Gaussian kernel, the student's through a
Laplacian one, and each through a learned 1x1 convolution that is dropped after training. The paper's constants were not
published; where it leaves a choice, the choice is named below.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, mse_loss

from ...convert.errors import ModelSourceError
from ..configs.recipe import Recipe
from .blocks import common_blocks
from .term import Outputs, Term


def gaussian_kernel(features: Tensor, temperature: float) -> Tensor:
    """Return ``exp(-y² / (2·T²))`` elementwise, y in units of its channel's root mean square.

    Args:
        features: ``[N, C, H, W]``.
        temperature: T; the lower, the fewer of the activations count.
    """
    return torch.exp(-(_normalize(features) / temperature).square() / 2)


def laplacian_kernel(features: Tensor, temperature: float) -> Tensor:
    """Return ``exp(-|y| / T)`` elementwise, y in units of its channel's root mean square.

    Args:
        features: ``[N, C, H, W]``.
        temperature: T; the lower, the fewer of the activations count.
    """
    return torch.exp(-_normalize(features).abs() / temperature)


def _normalize(features: Tensor) -> Tensor:
    """Bring each channel to a root mean square of 1, so that one temperature fits all networks and stages."""
    features = features.float()
    return features / features.detach().square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def stage_ends(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[int, int]]:
    """Find the blocks around converted layers after which the resolution changes or the network ends.

    Args:
        student: The converted model.
        teacher: A CNN with the same modules.

    Returns:
        Module paths in order of execution, with the student's and the teacher's channels there.

    Raises:
        ModelSourceError: The student has no converted layer, or the teacher no module to compare with it.
    """
    shapes = common_blocks(student, teacher)
    common = [path for path, (ours, theirs) in shapes.items() if len(ours) == 4 and ours[2:] == theirs[2:]]
    ends = [
        path
        for path, following in pairwise([*common, ""])
        if not following or shapes[path][0][2:] != shapes[following][0][2:]
    ]
    if not ends:
        raise ModelSourceError(
            f"no feature map of the teacher is as large as the student's, such as that of {next(iter(shapes))}; "
            "give the CNN that was converted with --teacher NAME|DIR"
        )
    return {path: (shapes[path][0][1], shapes[path][1][1]) for path in ends}


class KernelDistillation(Term):
    """Squared error between the kernel values of student and teacher at the ends of their stages.

    To keep the learned convolutions from making everything equal, their outputs are compared after a normalization to
    zero mean and unit variance. They begin as the identity, since a converted network's channels correspond to its
    teacher's.

    Args:
        recipe: All settings.
        student: The model, not yet prepared by accelerate.
        teacher: The CNN that teaches.

    Raises:
        ModelSourceError: The networks have no stage in common.
    """

    name = "kernel"
    switch = "kernel_loss_weight"
    keys = ("kernel_temperature",)
    teacher = "frozen"
    compares_modules = True

    def __init__(self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__(recipe, student, teacher)
        assert teacher is not None
        stages = stage_ends(student, teacher)
        self.paths = list(stages)
        self.student_heads = nn.ModuleList(_head(ours, theirs) for ours, theirs in stages.values())
        self.teacher_heads = nn.ModuleList(_head(theirs, theirs) for _, theirs in stages.values())

    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean over stages, a scalar."""
        assert teacher is not None
        temperature = self.settings["kernel_temperature"]
        errors = []
        for path, ours_head, theirs_head in zip(self.paths, self.student_heads, self.teacher_heads, strict=True):
            given = ours_head(laplacian_kernel(student.blocks[path], temperature))
            wanted = theirs_head(gaussian_kernel(teacher.blocks[path], temperature))
            errors.append(mse_loss(_standardize(given), _standardize(wanted)))
        return torch.stack(errors).mean()


def _head(channels: int, wanted: int) -> nn.Conv2d:
    """Make a 1x1 convolution that begins as the identity where both numbers of channels are equal."""
    head = nn.Conv2d(channels, wanted, 1, bias=False)
    nn.init.dirac_(head.weight)
    return head


def _standardize(values: Tensor) -> Tensor:
    """Give each channel zero mean and unit variance over the batch."""
    return batch_norm(values.float(), None, None, training=True)
