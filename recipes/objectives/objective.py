"""The loss of a training step: the weighted sum of named terms."""

import torch
from torch import Tensor, nn

from ..configs.recipe import Recipe
from .teacher import DistillationTeacher
from .term import Term, forward_both
from .terms import active_terms


class Objective(nn.Module):
    """The terms that a recipe turns on, and the teacher that they share.

    What it holds besides a frozen teacher trains with the student, and is saved with the run's state, not with the
    model. Terms compute their losses in fp32, also under autocast.

    Args:
        recipe: All settings.
        teacher: The teacher; ``None`` where no term needs one.
        student: The model to train, not yet prepared by accelerate.

    Raises:
        RecipeError: Settings exclude each other.
        ModelSourceError: A term compares modules that student or teacher lacks.
    """

    def __init__(self, recipe: Recipe, teacher: DistillationTeacher | None, student: nn.Module) -> None:
        super().__init__()
        network = None if teacher is None else teacher.model
        self.teacher = teacher
        self.terms = nn.ModuleDict({term.name: term(recipe, student, network) for term in active_terms(recipe)})
        self.paths = list(dict.fromkeys(path for term in self._terms for path in term.paths))
        self.train()

    @property
    def _terms(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term)]

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher trains alongside."""
        return any(term.teacher == "training" for term in self._terms)

    @property
    def trained_terms(self) -> list[Term]:
        """Terms that train something besides the student: the teacher, or layers of their own."""
        return [term for term in self._terms if term.teacher == "training" or any(True for _ in term.parameters())]

    @property
    def trains(self) -> bool:
        """Whether it has parameters that train: a teacher's, or a term's own."""
        return bool(self.trained_terms)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the values to log: the loss and its terms, or the loss alone where it has one term."""
        return ("loss", *self.terms) if len(self.terms) > 1 else ("loss",)

    def forward(self, model: nn.Module, batch: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the mean losses of a batch.

        Args:
            model: The model in training, as accelerate prepared it.
            batch: Images ``[N, C, H, W]``.
            targets: Labels ``[N]``, or class probabilities ``[N, classes]``.

        Returns:
            Scalars: each term by its name, before weighting, and their weighted sum as ``"loss"``.
        """
        student, teacher = forward_both(model, self.teacher, batch, self.paths)
        constant = None if teacher is None else teacher.detach()
        values: dict[str, Tensor] = {}
        for term in self._terms:
            values[term.name] = term(student, teacher if term.teacher == "training" else constant, targets)
        weighted = (term.weight * values[term.name] for term in self._terms)
        total = sum(weighted, student.logits.new_zeros((), dtype=torch.float32))
        return {"loss": total, **values}
