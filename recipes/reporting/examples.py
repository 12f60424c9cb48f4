"""Predictions of a model and its teacher for a few images of a data set."""

import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...convert.class_names import class_names_of, readable_names
from ...convert.errors import AdderkitError
from ...convert.graph.modes import device_of, eval_mode, move_like
from ..configs.recipe import Recipe
from ..data.datasets import DataConfig, ImageSource, class_names, subset
from ..data.loaders import evaluation_transform, make_loader
from ..training.models import Job, build_teacher, open_split, teacher_of

_logger = logging.getLogger(__name__)

_COMPARED = 256  # images that both models predict
_SHOWN = 6  # random ones of these, and at most as many on which the models disagree
_BEST = 3  # classes per prediction
_SIDE = 96  # pixels of the longer side of a thumbnail


class Guess(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and its predictions.

    Args:
        number: Number of the image among the compared ones, from 1.
        picture: PNG thumbnail, at most 96 pixels wide and high.
        truth: Label of the image.
        student: Best guesses of the model, best first.
        teacher: Best guesses of the teacher; empty without a teacher.
    """

    number: int
    picture: bytes
    truth: str
    student: tuple[Guess, ...]
    teacher: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Comparison of a model with its teacher.

    Args:
        dataset: Name of the data set, as given with ``--dataset``.
        images: Number of compared images.
        first: The first compared images; the order is random.
        differing: Some images on which model and teacher disagree.
        agreeing: Number of images on which they agree; ``None`` without a teacher.
        no_teacher: Reason for the lack of a teacher, without local paths; ``None`` with a teacher.
    """

    dataset: str
    images: int
    first: tuple[Example, ...]
    differing: tuple[Example, ...] = ()
    agreeing: int | None = None
    no_teacher: str | None = None


def find_examples(model: nn.Module, job: Job, recipe: Recipe) -> Examples:
    """Compare a model with its teacher on random images of the evaluation split, the same ones every time.

    Args:
        model: Student model; it is not changed. Its device computes.
        job: Folder of the model, and optionally a teacher.
        recipe: Data set and split.

    Raises:
        AdderkitError: The data set cannot be loaded or has other classes, or the given teacher cannot be loaded.
    """
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
        return Examples(recipe.dataset, len(seen), tuple(seen[:_SHOWN]), no_teacher=why)
    differing = [each for each in seen if each.student[0].label != each.teacher[0].label]
    shown = tuple([each for each in differing if each.number > _SHOWN][:_SHOWN])
    return Examples(recipe.dataset, len(seen), tuple(seen[:_SHOWN]), shown, len(seen) - len(differing))


def _teacher(job: Job, recipe: Recipe, model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """Return the teacher, or the reason for its lack; a teacher that was given must load."""
    try:
        if teacher_of(job) is None:
            return None, "the model records no teacher; give one with --teacher NAME|DIR"
        return build_teacher(job, recipe, model).to(device_of(model)), None
    except AdderkitError as error:
        if job.teacher is not None:
            raise
        _logger.warning("%s", error)  # it may contain local paths, which a page must not show
        return None, "the teacher that the model records cannot be loaded; give one with --teacher NAME|DIR"


def _class_names(dataset: ImageSource, model: Any) -> Sequence[str]:
    """Return names to show: of the data set, else of the model, else numbers."""
    names = class_names(dataset) or class_names_of(model)
    if names is not None:
        return readable_names(names)
    image = torch.zeros(1, *DataConfig.of(model).input_size, device=device_of(model))
    return [f"class {index}" for index in range(len(_probabilities(model, image)[0]))]


def _batches(dataset: ImageSource, model: nn.Module) -> Iterator[tuple[Tensor, Sequence[bytes], list[int]]]:
    """Iterate over images ``[N, C, H, W]``, a thumbnail of each, and their classes."""
    if not isinstance(dataset, IterableDataset):
        dataset = subset(dataset, _COMPARED, 0)
    prepare = evaluation_transform(DataConfig.of(model))

    def both(image: Any) -> tuple[Tensor, bytes]:
        return prepare(image), _picture(image)

    loader = make_loader(dataset, both, 32, 0, training=False)
    for (images, pictures), targets in islice(loader, _COMPARED // 32):
        yield images, pictures, targets.tolist()


def _picture(image: Image.Image) -> bytes:
    """Return a PNG thumbnail of the pixels, without the camera's metadata."""
    gray = image.mode in ("1", "L")
    small = image.convert("L" if gray else "RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(small)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@torch.no_grad()
def _probabilities(model: nn.Module, images: Tensor) -> list[Tensor]:
    with eval_mode(model):
        return list(model(move_like(images, model)).float().softmax(dim=1).cpu())


def _example(
    number: int, picture: bytes, target: int, student: Tensor, teacher: Tensor | None, names: Sequence[str]
) -> Example:
    return Example(number, picture, names[target], _best(student, names), _best(teacher, names))


def _best(probabilities: Tensor | None, names: Sequence[str]) -> tuple[Guess, ...]:
    if probabilities is None:
        return ()
    values, indices = probabilities.topk(min(_BEST, len(probabilities)))
    return tuple(Guess(names[index], value) for value, index in zip(values.tolist(), indices.tolist(), strict=True))
