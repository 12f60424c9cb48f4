"""Knowledge distillation from the original CNN, whatever normalization it was trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import DataConfig


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence between softened predictions, times T² (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student: Logits ``[N, classes]``; ``teacher`` likewise.
        teacher: See ``student``.
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


class RenormalizedModel(nn.Module):
    """A network that is given images as *it* expects them, though they were normalized for the student.

    Args:
        model: The network.
        student_data: How the images that arrive were normalized.

    Raises:
        ValueError: Teacher and student take images of different channels.
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
        """Images ``[N, C, H, W]`` as the student takes them, to the network's logits ``[N, classes]``."""
        logits: Tensor = self.model(images if self.same else images * self.scale + self.shift)
        return logits


class DistillationTeacher(RenormalizedModel):
    """The original CNN, frozen; see ``RenormalizedModel``."""

    def __init__(self, model: nn.Module, student_data: DataConfig) -> None:
        super().__init__(model.eval().requires_grad_(False), student_data)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See ``RenormalizedModel``; without a gradient."""
        return super().forward(images)

    def train(self, mode: bool = True) -> "DistillationTeacher":
        """Stays in evaluation mode."""
        return super().train(False)


def to_float32(values: Tensor) -> Tensor:
    """Values for a loss: half precision becomes fp32, fp64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)
