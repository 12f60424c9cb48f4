"""The loss of a training step: what the labels and the teacher make of the model's answers."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .distillation import Teacher, distillation_loss
from .recipe import Recipe


class Objective(nn.Module):
    """Cross-entropy with the labels and distillation from a teacher, each with the recipe's weight.

    Losses are taken from logits in fp32, also under autocast.

    Args:
        recipe: The weights and settings.
        teacher: The network to distil from, or ``None``.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher | None) -> None:
        super().__init__()
        self.recipe = recipe
        self.teacher = teacher

    def forward(self, model: nn.Module, batch: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over a batch.

        Args:
            model: The model in training, as accelerate prepared it.
            batch: Images ``[N, C, H, W]``.
            targets: Labels ``[N]``.

        Returns:
            A scalar.
        """
        logits = model(batch)
        recipe = self.recipe
        loss: Tensor = logits.new_zeros((), dtype=torch.float32)
        if recipe.task_loss_weight:
            task = cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing)
            loss = loss + recipe.task_loss_weight * task
        if self.teacher is not None:
            expected = self.teacher(batch)
            loss = loss + recipe.distill_loss_weight * distillation_loss(logits, expected, recipe.kd_temperature)
        return loss
