"""The table of loss terms, and the terms that a recipe turns on."""

from ...convert.errors import RecipeError
from ..configs.recipe import Recipe
from .blocks import BlockDistillation
from .kernels import KernelDistillation
from .labels import TaskLoss, TeacherTaskLoss
from .logits import LogitDistillation
from .term import TeacherNeed, Term

TERMS: tuple[type[Term], ...] = (TaskLoss, LogitDistillation, TeacherTaskLoss, BlockDistillation, KernelDistillation)


def active_terms(recipe: Recipe) -> list[type[Term]]:
    """Return the terms that a recipe turns on.

    Raises:
        RecipeError: Other settings exclude one of them, or a teacher would train that nothing learns from.
    """
    terms = [term for term in TERMS if getattr(recipe, term.switch)]
    for term in terms:
        term.check(recipe)
    alone = [term.switch for term in terms if term.teacher == "training"]
    users = [term.switch for term in TERMS if term.teacher == "frozen"]
    if alone and not any(getattr(recipe, switch) for switch in users):
        raise RecipeError(
            f"{alone[0]} is {getattr(recipe, alone[0])}, expected 0 where {', '.join(users)} are 0: "
            "nothing would learn from the teacher"
        )
    return terms


def teacher_need(recipe: Recipe) -> TeacherNeed:
    """Return what a recipe's terms need together: no teacher, a frozen one, or one that trains alongside.

    Raises:
        RecipeError: Settings exclude each other.
    """
    needs = {term.teacher for term in active_terms(recipe)}
    return "training" if "training" in needs else "frozen" if "frozen" in needs else None
