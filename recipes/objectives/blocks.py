"""Distillation block by block: behind each block of adder layers the student is to answer like the original CNN.

A converted network's blocks correspond to its teacher's, channel by channel, so their outputs can be compared as they
are, as calibration does (``convert/calibration/blockwise.py``);
BRECQ (arXiv 2102.05426) matches blocks for the same reason.
"""

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ...adder_layers.modules import adder_layers
from ...convert.calibration.blockwise import block_paths, outputs_at
from ...convert.errors import ModelSourceError
from ...convert.graph.layers import trace_layers
from ...convert.graph.modes import eval_mode
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig
from .objective import Objective
from .teacher import RenormalizedModel, to_float32


def common_blocks(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Blocks around adder layers that the teacher has too.

    Args:
        student: The converted model.
        teacher: A CNN.

    Returns:
        Module paths in order of execution, with the shapes of what student and teacher give there for one image.

    Raises:
        ModelSourceError: The student has no adder layer, or the teacher none of its blocks.
    """
    adders = adder_layers(student)
    if not adders:
        raise ModelSourceError(
            "the model has no adder layer, so no block to compare with the teacher's; convert it first, or give that "
            "loss the weight 0 (block_loss_weight, or kernel_loss_weight for pkkd)"
        )
    paths = block_paths(student, [layer for layer in trace_layers(student) if layer.path in adders])
    known = dict(teacher.named_modules())
    ours = _shapes(student, paths)
    theirs = _shapes(teacher, [path for path in paths if path in known])
    found = {path: (ours[path], theirs[path]) for path in paths if path in ours and path in theirs}
    if not found:
        raise ModelSourceError(
            f"the teacher has none of the modules that are compared, such as {paths[0]}; "
            "give the CNN that was converted with --teacher NAME|DIR, or that loss the weight 0 (block_loss_weight, or "
            "kernel_loss_weight for pkkd)"
        )
    return found


def _shapes(model: nn.Module, paths: list[str]) -> dict[str, torch.Size]:
    """Shapes of what modules give for one image, of those that give a tensor."""
    first = next(model.parameters())
    image = first.new_zeros(1, *DataConfig.of(model).input_size)
    with torch.no_grad(), eval_mode(model), outputs_at(model, paths) as found:
        model(image)
    return {path: value.shape for path, value in found.items()}


def blocks_loss(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Mean over blocks and images of the squared error, in units of the teacher's variance within the image.

    Each image has its own unit, so that the loss of a batch is the mean of its images', however they are divided among
    processes and steps.

    Args:
        ours: What the student's blocks give, by path, images in the first dimension.
        theirs: What the teacher's give.

    Returns:
        A scalar; 0 where there is no block.
    """
    losses = []
    for path, value in ours.items():
        given, wanted = (to_float32(each).flatten(1) for each in (value, theirs[path]))
        losses.append(((given - wanted).square().mean(1) / wanted.var(1).clamp_min(1e-6)).mean())
    return torch.stack(losses).mean() if losses else torch.zeros(())


Answer = tuple[Tensor, dict[str, Tensor]]


def answers(model: nn.Module, teacher: RenormalizedModel, batch: Tensor, paths: Sequence[str]) -> tuple[Answer, Answer]:
    """Logits ``[N, classes]`` of student and teacher, and what their modules at ``paths`` give.

    Args:
        model: The student, as accelerate prepared it.
        teacher: The CNN.
        batch: Images ``[N, C, H, W]``.
        paths: Of modules that both have.
    """
    student = extract_model_from_parallel(model, keep_torch_compile=False)
    with outputs_at(student, paths) as ours, outputs_at(teacher.model, paths) as theirs:
        return (model(batch), ours), (teacher(batch), theirs)


class BlockObjective(Objective):
    """The loss of the predictions and, with the recipe's weight, that of the blocks' outputs.

    Blocks of another shape than the teacher's, as pruning leaves behind, are not compared.

    Args:
        recipe: The weights and settings.
        teacher: The CNN that was converted, frozen.
        student: The model, not yet prepared by accelerate.

    Raises:
        ModelSourceError: See ``common_blocks``.
    """

    teacher: RenormalizedModel

    def __init__(self, recipe: Recipe, teacher: RenormalizedModel, student: nn.Module) -> None:
        super().__init__(recipe, teacher)
        shapes = common_blocks(student, teacher.model)
        self.paths = [path for path, (ours, theirs) in shapes.items() if ours == theirs]

    def forward(self, model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
        """See ``Objective``; the model is the one that this was built for, as accelerate prepared it."""
        (logits, ours), (expected, theirs) = answers(model, self.teacher, batch, self.paths)
        loss = self.student_loss(logits, expected, targets)
        return loss + self.recipe.block_loss_weight * blocks_loss(ours, theirs)
