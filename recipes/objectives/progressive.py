"""Progressive kernel-based distillation: the CNN trains alongside the adder network and teaches it stage by stage.

After PKKD (Xu et al., NeurIPS 2020, arXiv 2009.13044). The features of a CNN are distributed nearly like a Gaussian,
those of an adder network nearly like a Laplacian, so they are not compared as they are: the teacher's go through a
Gaussian kernel, the student's through a Laplacian one, and each through a learned 1x1 convolution that is dropped after
training. The paper's constants were not published; where it leaves a choice, the choice is named below.
"""

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.functional import batch_norm, mse_loss

from ...convert.errors import ModelSourceError
from ..configs.recipe import Recipe
from .blocks import answers, common_blocks
from .objective import Objective
from .teacher import RenormalizedModel


def gaussian_kernel(features: Tensor, temperature: float) -> Tensor:
    """``exp(-y² / (2·T²))`` elementwise, y in units of its channel's root mean square.

    Args:
        features: ``[N, C, H, W]``.
        temperature: T; the lower, the fewer of the activations count.
    """
    return torch.exp(-(_in_units(features) / temperature).square() / 2)


def laplacian_kernel(features: Tensor, temperature: float) -> Tensor:
    """``exp(-|y| / T)``; see ``gaussian_kernel``."""
    return torch.exp(-_in_units(features).abs() / temperature)


def _in_units(features: Tensor) -> Tensor:
    """Features of any network and stage in one unit, so that one temperature fits all."""
    features = features.float()
    return features / features.detach().square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def stage_ends(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[int, int]]:
    """Blocks of adder layers behind which the resolution changes, or nothing follows: where the networks are compared.

    Args:
        student: The converted model.
        teacher: A CNN with the same modules.

    Returns:
        Module paths in order of execution, with the channels there of student and teacher.

    Raises:
        ModelSourceError: The student has no adder layer, or the teacher no module to compare with it.
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


def prepare_teacher(
    recipe: Recipe, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer
) -> Objective:
    """Let the teacher and the learned convolutions train too.

    They join the student's optimizer with a learning rate of their own, since a step that is skipped is then skipped
    for both; what accelerate prepares, it also reduces over processes and saves with the run's state, not with the
    model.
    """
    rate = dataclasses.replace(recipe, lr=recipe.teacher_lr).scaled_lr(accelerator.num_processes)
    for group in param_groups_weight_decay(objective, recipe.weight_decay):
        optimizer.add_param_group({**group, "lr": rate})
    prepared: Objective = accelerator.prepare(objective)
    return prepared


class ProgressiveObjective(Objective):
    """The losses of student and teacher, which train together.

    The teacher learns from the labels alone, with batch statistics; no gradient of the student's losses reaches it.
    The student learns as with a frozen teacher, and to give the kernel values of the teacher's stages. To keep the
    learned convolutions from making everything equal, their outputs are compared after a normalization to zero mean
    and unit variance. They begin as the identity, since a converted network's channels correspond to its teacher's.

    Args:
        recipe: The weights and settings.
        teacher: The CNN that trains alongside.
        student: The model, not yet prepared by accelerate.

    Raises:
        ModelSourceError: See ``stage_ends``.
    """

    teacher: RenormalizedModel

    def __init__(self, recipe: Recipe, teacher: RenormalizedModel, student: nn.Module) -> None:
        super().__init__(recipe, teacher)
        self.paths: list[str] = []
        self.student_heads, self.teacher_heads = nn.ModuleList(), nn.ModuleList()
        if recipe.kernel_loss_weight:
            for path, (ours, theirs) in stage_ends(student, teacher.model).items():
                self.paths.append(path)
                self.student_heads.append(_head(ours, theirs))
                self.teacher_heads.append(_head(theirs, theirs))
        self.train()

    def forward(self, model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
        """See ``Objective``; the model is the one that this was built for, as accelerate prepared it."""
        (logits, ours), (expected, theirs) = answers(model, self.teacher, batch, self.paths)
        loss = self.student_loss(logits, expected.detach(), targets) + self.task_loss(expected, targets)
        if self.paths:
            loss = loss + self.recipe.kernel_loss_weight * self._kernel_loss(ours, theirs)
        return loss

    def _kernel_loss(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Mean over stages of the mean squared error between the heads' outputs."""
        temperature = self.recipe.kernel_temperature
        errors = []
        for path, ours_head, theirs_head in zip(self.paths, self.student_heads, self.teacher_heads, strict=True):
            given = ours_head(laplacian_kernel(ours[path], temperature))
            wanted = theirs_head(gaussian_kernel(theirs[path].detach(), temperature))
            errors.append(mse_loss(_standard(given), _standard(wanted)))
        return torch.stack(errors).mean()


def _head(channels: int, wanted: int) -> nn.Conv2d:
    """A 1x1 convolution that changes nothing where the channels are as many as wanted."""
    head = nn.Conv2d(channels, wanted, 1, bias=False)
    nn.init.dirac_(head.weight)
    return head


def _standard(values: Tensor) -> Tensor:
    """Each channel with zero mean and unit variance over the batch."""
    return batch_norm(values.float(), None, None, training=True)
