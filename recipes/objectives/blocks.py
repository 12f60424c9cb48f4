"""Block distillation: match the outputs of the student's converted blocks to those of the original CNN.

The blocks of a converted network correspond to its teacher's channel by channel, so their outputs can be compared
without a projection, as calibration does (``convert/calibration/blockwise.py``); BRECQ (arXiv 2102.05426) matches
blocks for the same reason.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...convert.calibration.blockwise import block_paths, outputs_at
from ...convert.conversion.targets import converted_layers
from ...convert.errors import ModelSourceError
from ...convert.graph.layers import trace_layers
from ...convert.graph.modes import eval_mode
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig
from ..data.notices import notify
from .term import Outputs, Term, to_float32


def common_blocks(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Find the blocks around converted layers that the teacher has too.

    Args:
        student: The converted model.
        teacher: A CNN.

    Returns:
        Module paths in order of execution, with the shapes of the student's and the teacher's output for one image.

    Raises:
        ModelSourceError: The student has no converted layer, or the teacher none of its blocks.
    """
    converted = converted_layers(student)
    if not converted:
        raise ModelSourceError(
            "the model has no converted layer, so no block to compare with the teacher's; convert it first, or give "
            "that loss the weight 0 (block_loss_weight, kernel_loss_weight)"
        )
    paths = block_paths(student, [layer for layer in trace_layers(student) if layer.path in converted])
    known = dict(teacher.named_modules())
    ours = _output_shapes(student, paths)
    theirs = _output_shapes(teacher, [path for path in paths if path in known])
    found = {path: (ours[path], theirs[path]) for path in paths if path in ours and path in theirs}
    if not found:
        raise ModelSourceError(
            f"the teacher has none of the modules that are compared, such as {paths[0]}; "
            "give the CNN that was converted with --teacher NAME|DIR, or give that loss the weight 0 "
            "(block_loss_weight, kernel_loss_weight)"
        )
    return found


def _output_shapes(model: nn.Module, paths: list[str]) -> dict[str, torch.Size]:
    """Shapes of the modules' outputs for one image; modules that do not return a tensor are left out."""
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
        ours: Outputs of the student's blocks by path, images in the first dimension.
        theirs: Outputs of the teacher's blocks, likewise.
    """
    losses = []
    for path, value in ours.items():
        given, wanted = (to_float32(each).flatten(1) for each in (value, theirs[path]))
        losses.append(((given - wanted).square().mean(1) / wanted.var(1).clamp_min(1e-6)).mean())
    return torch.stack(losses).mean()


class BlockDistillation(Term):
    """Squared error between the outputs of the student's blocks and the teacher's.

    Blocks whose shape differs from the teacher's, as after pruning, are not compared, which a message says.

    Args:
        recipe: All settings.
        student: The model, not yet prepared by accelerate.
        teacher: The CNN that was converted.

    Raises:
        ModelSourceError: The networks have no block in common.
    """

    name = "block"
    switch = "block_loss_weight"
    teacher = "frozen"
    compares_modules = True

    def __init__(self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__(recipe, student, teacher)
        assert teacher is not None
        shapes = common_blocks(student, teacher)
        self.paths = [path for path, (ours, theirs) in shapes.items() if ours == theirs]
        left_out = len(shapes) - len(self.paths)
        if left_out:
            notify(
                f"block_loss_weight: {left_out} of {len(shapes)} blocks have other shapes in the teacher, as after "
                "pruning, and are not compared with it"
            )

    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean over blocks and images, a scalar; 0 where no block has the teacher's shape."""
        assert teacher is not None
        if not self.paths:
            return student.logits.new_zeros((), dtype=torch.float32)
        return blocks_loss({path: student.blocks[path] for path in self.paths}, teacher.blocks)
