"""Labels: from the numbers of a data set to the class indices of a model, by class name where both have names."""

import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.utils.misc import natural_key
from torch import nn

from ...convert.class_names import class_names_of, has_imagenet_classes, imagenet_names, record_class_names_
from ...convert.errors import DatasetError
from .notices import notify

_LISTED = 4  # names in a message


@dataclasses.dataclass(frozen=True)
class Labels:
    """Translation of a data set's labels to class indices.

    Args:
        classes: Number of classes; ``None`` if unknown.
        names: Class names in order of class index, if they are known.
        indices: Class index of each label of the data set; ``None`` if labels are class indices.
    """

    classes: int | None
    names: tuple[str, ...] | None = None
    indices: Mapping[int, int] | None = None

    def __call__(self, label: Any) -> int:
        """Return the class index of a label.

        Raises:
            DatasetError: The label is not an integer, or out of range.
        """
        try:
            index = operator.index(label)
        except TypeError:
            raise DatasetError(f"its label is {label!r:.60}, expected the number of a class") from None
        if self.indices is not None:
            if index not in self.indices:
                raise DatasetError(f"its label is {index}, expected one of the {len(self.indices)} that are mapped")
            index = self.indices[index]
        if index < 0 or (self.classes is not None and index >= self.classes):
            last = "" if self.classes is None else f" to {self.classes - 1}"
            raise DatasetError(f"its label is {index}, expected a class index from 0{last}")
        return index


def no_label(label: Any) -> int:
    """Return 0 for any label; for images whose labels are not used."""
    return 0


def match_labels(
    names: Sequence[str] | None, model: nn.Module, data: str, class_map: Mapping[str, int] | None, *, training: bool
) -> Labels:
    """Match the classes of a data set with a model's, by name where both are known.

    Args:
        names: Class names of the data set in order of its labels; ``None`` if it has none.
        model: Model whose class names, if it records any, decide the order.
        data: Name of the data set and split, for messages.
        class_map: Class index by the data set's class name, or by its label written as text.
        training: All classes are required; otherwise some may be without images.

    Raises:
        DatasetError: The data set has other classes than the model.
    """
    own, classes = class_names_of(model), getattr(model, "num_classes", None)
    if class_map is not None:
        return _mapped(names, class_map, own, classes, data)
    if names is None or classes is None:
        return Labels(classes, own)
    own = own or imagenet_names(model, names)
    if own is None or len({*own}) < len(own):  # names that occur twice say nothing
        if len(names) != classes:
            raise DatasetError(
                f"{data} has {len(names)} classes, expected {classes}, as in the model; "
                "train the model on it first, or name another data set"
            )
        _say_by_position(names, data)
        return Labels(classes, tuple(names))
    _require_known(names, own, data)
    if training and len(names) < len(own):
        lacking = _listed(set(own) - set(names))
        raise DatasetError(
            f"{data} has {len(names)} classes, expected {classes}, as in the model: it lacks {lacking}; "
            "add images of them, or train a new model"
        )
    if tuple(names) == own:
        return Labels(classes, own)
    if len(names) < len(own):
        notify(f"{data} has images of {len(names)} of the model's {len(own)} classes, matched by name")
    else:
        notify(f"{data} numbers its classes differently from the model; they are matched by name")
    place = {name: index for index, name in enumerate(own)}
    return Labels(classes, own, {label: place[name] for label, name in enumerate(names)})


def compare_unlabeled(names: Sequence[str] | None, model: nn.Module, data: str) -> None:
    """Record the class names of the data set that a model is calibrated on, or say that the model has other classes.

    Args:
        names: Class names of the data set.
        model: Model; one without class names records those of a data set with as many classes.
        data: Name of the data set and split, for messages.
    """
    if names is None:
        return
    own = class_names_of(model)
    if own is not None:
        unknown = set(names) - set(own)
        if unknown:
            notify(
                f"{data} has classes that the model does not have: {_listed(unknown)}; labels are not used, but "
                "calibrate on images like those that the model is for"
            )
        return
    named = not has_imagenet_classes(model) or imagenet_names(model, names) is not None
    if named and len(names) == getattr(model, "num_classes", None):
        record_class_names_(model, names)
        notify(f"the model's class names are now those of {data} {_listed(names)}")


def read_class_map(path: str, data_dir: str | None = None) -> dict[str, int]:
    """Read a class map: class indices by class name, as timm's ``--class-map`` has it, but without pickle.

    Args:
        path: ``.txt`` file with a class name per line, in order of class index; or ``.json`` file with such a list or
            with ``{name: index}``.
        data_dir: Folder of the data set, in which a relative path is looked for as well.

    Raises:
        DatasetError: The file is missing, of another kind or damaged.
    """
    file = Path(path)
    if not file.is_file() and data_dir:
        file = Path(data_dir) / path
    wanted = "expected a .txt file with a class name per line, or a .json file with a list of names or {name: index}"
    if file.suffix.lower() not in (".txt", ".json"):
        raise DatasetError(f"class map {path} is a {file.suffix or 'file without suffix'}, {wanted}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        value = json.loads(text) if file.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DatasetError(f"cannot read class map {path}: {reason}; {wanted}") from error
    pairs = [(name, index) for index, name in enumerate(value) if name] if isinstance(value, list) else None
    if isinstance(value, dict):
        pairs = list(value.items())
    if not pairs or not all(isinstance(name, str) and type(index) is int and index >= 0 for name, index in pairs):
        raise DatasetError(f"class map {path} has the wrong contents, {wanted}")
    mapped = dict(pairs)
    if len(mapped) < len(pairs):
        twice = next(name for name, index in pairs if mapped[name] != index)
        raise DatasetError(f"class map {path} lists {twice!r} twice, expected each class once")
    return mapped


def _mapped(
    names: Sequence[str] | None,
    class_map: Mapping[str, int],
    own: tuple[str, ...] | None,
    classes: int | None,
    data: str,
) -> Labels:
    """Return the translation by a class map, which must agree with the model's names where these are the same."""
    if classes is not None and max(class_map.values()) >= classes:
        name = max(class_map, key=class_map.__getitem__)
        raise DatasetError(f"the class map gives {name!r} the index {class_map[name]}, expected at most {classes - 1}")
    for index, name in enumerate(own or ()):
        if class_map.get(name, index) != index:
            raise DatasetError(
                f"the class map gives {name!r} the index {class_map[name]}, expected {index} as the model records"
            )
    if names is None:
        return Labels(classes, own, {int(name): index for name, index in class_map.items() if name.isdecimal()})
    unknown = set(names) - set(class_map)
    if unknown:
        raise DatasetError(f"the class map lacks classes of {data}: {_listed(unknown)}")
    by_index = {index: name for name, index in class_map.items()}
    complete = len(by_index) == len(class_map) and by_index.keys() == set(range(classes or len(by_index)))
    found = tuple(by_index[index] for index in sorted(by_index)) if complete else None
    return Labels(classes, own or found, {label: class_map[name] for label, name in enumerate(names)})


def _require_known(names: Sequence[str], own: Sequence[str], data: str) -> None:
    unknown = set(names) - set(own)
    if unknown:
        lacking = set(own) - set(names)
        has = f", and lacks {_listed(lacking)}" if lacking else ""
        raise DatasetError(
            f"{data} has classes that the model does not have: {_listed(unknown)}{has}; name the data set that the "
            "model was trained on, or say which classes correspond with --class-map FILE"
        )


def _say_by_position(names: Sequence[str], data: str) -> None:
    line = f"the model records no class names: the classes of {data} are taken in order, {_listed(names)}"
    if sorted(names) != list(names) and sorted(names, key=natural_key) == list(names):
        line += (
            f"; this is timm's natural order, whereas torchvision's ImageFolder begins with {_listed(sorted(names))}: "
            "if the model was trained with that order, give it with --class-map"
        )
    notify(line)


def _listed(names: Sequence[str] | set[str]) -> str:
    chosen = sorted(names, key=natural_key) if isinstance(names, set) else list(names)
    return ", ".join(chosen[:_LISTED]) + (", …" if len(chosen) > _LISTED else "")
