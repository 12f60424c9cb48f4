"""Class names of a model, under timm's key ``label_names``."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

_WORDNET_ID = re.compile(r"n\d{8}")


def class_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """Return the class names that a model records, in order of class index; ``None`` without a name for every class."""
    names: Any = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    classes = getattr(model, "num_classes", None)
    if isinstance(names, Mapping):  # timm also knows {index: name}, with indices as text in JSON
        by_index = {str(index): name for index, name in names.items()}
        names = [by_index.get(str(index)) for index in range(len(by_index))]
    if not isinstance(names, list | tuple) or len(names) != classes or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def record_class_names_(model: nn.Module, names: Sequence[str]) -> None:
    """Record the class names of a model in order of class index; ``save`` writes them to ``config.json``."""
    timm_model: Any = model
    timm_model.pretrained_cfg = {**timm_model.pretrained_cfg, "label_names": list(names)}


def imagenet_names(model: nn.Module, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the WordNet ids of the ImageNet classes that a model has by their number, if the given names are such ids.

    Args:
        model: Model that records no class names.
        names: Class names of a data set, such as ``n01440764``.
    """
    subset = infer_imagenet_subset(model)
    if subset is None or not all(_WORDNET_ID.fullmatch(name) for name in names):
        return None
    known = ImageNetInfo(subset).label_names()
    return tuple(known) if set(names) <= set(known) else None


def has_imagenet_classes(model: nn.Module) -> bool:
    """Return whether the number of a model's classes is that of ImageNet, or of a part of it that timm knows."""
    return infer_imagenet_subset(model) is not None


def readable_names(names: Sequence[str]) -> list[str]:
    """Return class names for display: words in place of ImageNet's WordNet IDs."""
    if not all(_WORDNET_ID.fullmatch(name) for name in names):
        return list(names)
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name) if name in known else name for name in names]
    number = Counter(words)  # there are two kinds of cranes
    return [word if number[word] == 1 else f"{word} ({name})" for word, name in zip(words, names, strict=True)]
