"""Logit distillation: the student learns the teacher's softened predictions."""

import torch.nn.functional as F
from torch import Tensor

from .term import Outputs, Term, to_float32


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence between softened predictions, times T² (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student: The student's logits ``[N, classes]``.
        teacher: The teacher's logits ``[N, classes]``.
        temperature: T; 1 compares the predictions as they are.

    Returns:
        The mean over images, a scalar. T² keeps the gradient's size when T changes.
    """
    return (
        F.kl_div(
            F.log_softmax(to_float32(student) / temperature, dim=1),
            F.log_softmax(to_float32(teacher) / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        * temperature**2
    )


class LogitDistillation(Term):
    """Divergence of the student's predictions from the teacher's."""

    name = "distill"
    switch = "distill_loss_weight"
    keys = ("kd_temperature",)
    teacher = "frozen"

    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean over images, a scalar."""
        assert teacher is not None
        return distillation_loss(student.logits, teacher.logits, self.settings["kd_temperature"])
