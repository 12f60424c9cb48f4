"""The loss of a training step: what the labels and the teacher make of the model's answers."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..configs.recipe import Recipe
from .teacher import RenormalizedModel, distillation_loss


class Objective(nn.Module):
    """Cross-entropy with the labels and distillation from a teacher, each with the recipe's weight.

    Losses are taken from logits in fp32, also under autocast.

    Args:
        recipe: The weights and settings.
        teacher: The network to distil from, or ``None``.
    """

    def __init__(self, recipe: Recipe, teacher: RenormalizedModel | None) -> None:
        super().__init__()
        self.recipe = recipe
        self.teacher = teacher

    def forward(self, model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch.

        Args:
            model: The model in training, as accelerate prepared it.
            batch: Images ``[N, C, H, W]``.
            targets: Labels ``[N]``, or shares of the classes ``[N, classes]``.

        Returns:
            A scalar.
        """
        expected = None if self.teacher is None else self.teacher(batch)
        return self.student_loss(model(batch), expected, targets)

    def student_loss(self, logits: Tensor, expected: Tensor | None, targets: Tensor) -> Tensor:
        """The loss of the model's logits ``[N, classes]``, given the teacher's."""
        recipe = self.recipe
        loss: Tensor = logits.new_zeros((), dtype=torch.float32)
        if recipe.task_loss_weight:
            loss = loss + recipe.task_loss_weight * self.task_loss(logits, targets)
        if expected is not None:
            loss = loss + recipe.distill_loss_weight * distillation_loss(logits, expected, recipe.kd_temperature)
        return loss

    def task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits with the labels, or with shares of classes."""
        return cross_entropy(logits.float(), targets, label_smoothing=self.recipe.smoothing)
