"""The distillation teacher: a network that sees images normalized its own way, frozen or training alongside."""

import torch
from torch import Tensor, nn

from ..data.datasets import DataConfig


class DistillationTeacher(nn.Module):
    """A network that is fed images normalized for the student, which it normalizes its own way.

    This one trains alongside the student; ``FrozenTeacher`` does not train.

    Args:
        model: The network.
        student_data: Normalization and channels of the images that arrive.

    Raises:
        ValueError: Teacher and student take images with different numbers of channels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, student_data: DataConfig) -> None:
        super().__init__()
        teacher_data = DataConfig.of(model)
        if teacher_data.input_size[0] != student_data.input_size[0]:
            raise ValueError(
                f"the teacher takes {teacher_data.input_size[0]} channels, expected {student_data.input_size[0]} "
                "as the student takes"
            )
        self.model = model
        mean, std = (_channels(values) for values in (student_data.mean, student_data.std))
        teacher_mean, teacher_std = (_channels(values) for values in (teacher_data.mean, teacher_data.std))
        self.same = torch.equal(mean, teacher_mean) and torch.equal(std, teacher_std)
        self.register_buffer("scale", std / teacher_std, persistent=False)
        self.register_buffer("shift", (mean - teacher_mean) / teacher_std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` for images ``[N, C, H, W]`` that are normalized for the student."""
        logits: Tensor = self.model(images if self.same else images * self.scale + self.shift)
        return logits


class FrozenTeacher(DistillationTeacher):
    """A teacher without gradients that stays in evaluation mode.

    Args:
        model: The network, which is frozen in place.
        student_data: Normalization and channels of the images that arrive.
    """

    def __init__(self, model: nn.Module, student_data: DataConfig) -> None:
        super().__init__(model.eval().requires_grad_(False), student_data)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, classes]``, without a gradient."""
        return super().forward(images)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode."""
        return super().train(False)


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)
