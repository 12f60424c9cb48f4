"""Losses on labels: the student's, and that of a teacher that trains alongside."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..configs.recipe import Recipe
from .term import Outputs, Term


class TaskLoss(Term):
    """Cross-entropy of the student's predictions with the labels."""

    name = "task"
    switch = "task_loss_weight"
    keys = ("smoothing",)

    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean over images, a scalar."""
        return cross_entropy(student.logits.float(), targets, label_smoothing=self.settings["smoothing"])


class TeacherTaskLoss(Term):
    """Cross-entropy of the teacher's predictions with the labels, with weight 1: the teacher trains alongside.

    The labels are all that the teacher learns from; no gradient of another term reaches it.
    """

    name = "teacher"
    switch = "teacher_lr"
    keys = ("smoothing",)
    teacher = "training"

    def __init__(self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__(recipe, student, teacher)
        self.weight = 1.0

    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean over images, a scalar."""
        assert teacher is not None
        return cross_entropy(teacher.logits.float(), targets, label_smoothing=self.settings["smoothing"])
