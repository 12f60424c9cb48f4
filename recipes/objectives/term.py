"""The base class of loss terms, and the outputs of student and teacher that terms compare."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ...convert.calibration.blockwise import outputs_at
from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from .teacher import DistillationTeacher

TeacherNeed = Literal["frozen", "training"] | None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs of one network for a batch.

    Args:
        logits: ``[N, classes]``.
        blocks: Outputs of the modules that terms asked for, by path, images in the first dimension.
    """

    logits: Tensor
    blocks: Mapping[str, Tensor]

    def detach(self) -> "Outputs":
        """The same values without a gradient."""
        return Outputs(self.logits.detach(), {path: value.detach() for path, value in self.blocks.items()})


class Term(nn.Module, abc.ABC):
    """One loss: a name, the recipe keys that it reads, what it needs of the teacher, and its value for a batch.

    A subclass sets the class attributes and implements ``forward``. Parameters of its own train with the student. The
    base class's checks suffice unless keys of the recipe exclude each other.

    Args:
        recipe: All settings; a term reads those that it names.
        student: The model to train, not yet prepared by accelerate.
        teacher: The teacher's network; ``None`` where no term needs one.

    Attributes:
        name: Name in logs, ``summary.csv`` and trackers.
        switch: Recipe key that turns the term on where it is above 0; the term's weight, unless ``weight`` is set.
        keys: Other recipe keys that it reads, numbers all of them.
        teacher: ``"frozen"`` where any teacher will do, ``"training"`` for one that trains alongside.
        compares_modules: Whether it compares outputs of modules within the networks, those at ``paths``.
        paths: Modules that student and teacher have in common, chosen when the term is built.
        weight: Factor in the total.
    """

    name: ClassVar[str]
    switch: ClassVar[str]
    keys: ClassVar[tuple[str, ...]] = ()
    teacher: ClassVar[TeacherNeed] = None
    compares_modules: ClassVar[bool] = False
    paths: Sequence[str] = ()

    def __init__(self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None) -> None:
        super().__init__()
        self.weight: float = getattr(recipe, self.switch)
        self.settings: dict[str, float] = {key: getattr(recipe, key) for key in self.keys}

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Refuse a recipe whose other settings exclude this term.

        Raises:
            RecipeError: The term compares modules, and the model is trained for integers.
        """
        if cls.compares_modules and recipe.bits:
            raise RecipeError(
                f"{cls.switch} is {getattr(recipe, cls.switch)}, expected 0 where bits is not 0 (now {recipe.bits}): "
                "a model that is trained for integers has no floating-point features to compare with a teacher's"
            )

    @abc.abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, before weighting: a scalar.

        Args:
            student: Outputs of the model in training.
            teacher: Outputs of the teacher, detached unless ``teacher`` is ``"training"``; ``None`` without one.
            targets: Labels ``[N]``, or class probabilities ``[N, classes]``.
        """


def forward_both(
    model: nn.Module, teacher: DistillationTeacher | None, batch: Tensor, paths: Sequence[str]
) -> tuple[Outputs, Outputs | None]:
    """Run student and teacher on a batch and collect what terms compare.

    Args:
        model: The student, as accelerate prepared it.
        teacher: The teacher, or ``None``.
        batch: Images ``[N, C, H, W]``.
        paths: Modules of both networks whose outputs are collected.
    """
    with outputs_at(extract_model_from_parallel(model, keep_torch_compile=False), paths) as blocks:
        student = Outputs(model(batch), blocks)
    if teacher is None:
        return student, None
    with outputs_at(teacher.model, paths) as blocks:
        return student, Outputs(teacher(batch), blocks)


def to_float32(values: Tensor) -> Tensor:
    """Return values in fp32, or in fp64 where they are: losses are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
