"""A few images of a data set with what a model and its teacher make of them."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...convert.errors import AdderkitError
from ...convert.graph.modes import eval_mode
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource, class_names, subset
from ..data.loaders import evaluation_transform, make_loader
from ..training.models import Job, build_teacher, open_split, teacher_of

_COMPARED = 256  # images that both models see
_SHOWN = 6  # of these, and as many at most where they disagree
_BEST = 3  # classes
_SIDE = 96  # pixels of a picture's longer side


class Guess(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and what was made of it.

    Args:
        number: Which of the compared images it is, from 1.
        picture: PNG, at most 96 pixels wide and high.
        truth: Its class.
        student: The model's best guesses, best first.
        teacher: The teacher's; empty where there is none.
    """

    number: int
    picture: bytes
    truth: str
    student: tuple[Guess, ...]
    teacher: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """What was compared.

    Args:
        dataset: As ``--dataset`` names it.
        images: Number of images that were compared.
        first: The first of them, which are random ones.
        differing: Some in which teacher and student disagree.
        agreeing: Number in which they agree; ``None`` without a teacher.
        no_teacher: Why there is no teacher, where there is none.
    """

    dataset: str
    images: int
    first: tuple[Example, ...]
    differing: tuple[Example, ...] = ()
    agreeing: int | None = None
    no_teacher: str | None = None


def find_examples(model: nn.Module, job: Job, dataset: str, data_dir: str | None) -> Examples:
    """Compare a model with its teacher on random images of the validation split; the same ones every time.

    Args:
        model: The student, which stays as it is.
        job: The folder it is from, and the teacher where one was named.
        dataset: Name of the data set.
        data_dir: Where its files are.

    Raises:
        AdderkitError: The data set cannot be had or has other classes, or the teacher that was named cannot be had.
    """
    recipe = Recipe(dataset=dataset, data_dir=data_dir)
    teacher, why = _teacher(job, recipe, model)
    split = open_split(recipe, model, training=False)
    names = _class_names(split, model)
    seen: list[Example] = []
    for images, pictures, targets in _batches(split, model):
        student = _probabilities(model, images)
        other = _probabilities(teacher, images) if teacher is not None else [None] * len(images)
        for each in zip(pictures, targets, student, other, strict=True):
            seen.append(_example(len(seen) + 1, *each, names))
    if teacher is None:
        return Examples(dataset, len(seen), tuple(seen[:_SHOWN]), no_teacher=why)
    differing = [each for each in seen if each.student[0].label != each.teacher[0].label]
    shown = tuple([each for each in differing if each.number > _SHOWN][:_SHOWN])
    return Examples(dataset, len(seen), tuple(seen[:_SHOWN]), shown, len(seen) - len(differing))


def _teacher(job: Job, recipe: Recipe, model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The teacher, or why there is none; one that was named must be had."""
    if teacher_of(job) is None:
        return None, f"{job.source.name} names no teacher; give one with --teacher NAME|DIR"
    try:
        return build_teacher(job, recipe, model), None
    except AdderkitError as error:
        if job.teacher is not None:
            raise
        return None, str(error)


def _class_names(dataset: ImageSource, model: Any) -> Sequence[str]:
    return class_names(dataset) or [f"class {index}" for index in range(model.num_classes)]


def _batches(dataset: ImageSource, model: nn.Module) -> Iterator[tuple[Tensor, Sequence[bytes], list[int]]]:
    """Images ``[N, C, H, W]``, a small picture of each, and their classes."""
    if not isinstance(dataset, IterableDataset):
        dataset = subset(dataset, _COMPARED, 0)
    prepare = evaluation_transform(DataConfig.of(model))

    def both(image: Any) -> tuple[Tensor, bytes]:
        return prepare(image), _picture(image)

    loader = make_loader(dataset, both, 32, 0, training=False)
    for (images, pictures), targets in islice(loader, _COMPARED // 32):
        yield images, pictures, targets.tolist()


def _picture(image: Image.Image) -> bytes:
    """A small PNG of the pixels alone, without what a camera wrote beside them."""
    gray = image.mode in ("1", "L")
    small = image.convert("L" if gray else "RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(small)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@torch.no_grad()
def _probabilities(model: nn.Module, images: Tensor) -> list[Tensor]:
    with eval_mode(model):
        return list(model(images).float().softmax(dim=1))


def _example(
    number: int, picture: bytes, target: int, student: Tensor, teacher: Tensor | None, names: Sequence[str]
) -> Example:
    return Example(number, picture, names[target], _best(student, names), _best(teacher, names))


def _best(probabilities: Tensor | None, names: Sequence[str]) -> tuple[Guess, ...]:
    if probabilities is None:
        return ()
    values, indices = probabilities.topk(min(_BEST, len(probabilities)))
    return tuple(Guess(names[index], value) for value, index in zip(values.tolist(), indices.tolist(), strict=True))
