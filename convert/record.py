"""Record of the transforms that were applied to a model, which travels with it and rebuilds it from its base.

A transform is a JSON-ready mapping with a ``kind`` and a ``version``; what else it holds is up to its kind. This module
knows nothing of the kinds except which of them leave a model that is no longer a plain float network; the code that
checks and replays them is ``checkpoint/replay.py``.
"""

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from .errors import AdderkitError, CheckpointError

Transform = dict[str, Any]
ModelForm = Literal["float", "fake_quantized", "integer"]

_FORMS: dict[str, ModelForm] = {"fake_quantize": "fake_quantized", "quantize": "integer"}
_WORDS: dict[ModelForm, str] = {"fake_quantized": "prepared for quantization-aware training", "integer": "quantized"}
PATH_LISTS = ("modules", "normalized", "folded")
TERMS = "terms"  # terms of the weights by path, where they are several


def transforms_of(model: nn.Module) -> list[Transform]:
    """Return a copy of the model's record: the transforms that were applied to it, in order."""
    return copy.deepcopy(getattr(model, "_adderkit_transforms", []))


def record_(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Append a transform that was applied to the model to its record."""
    set_transforms_(model, [*transforms_of(model), transform])


def set_transforms_(model: nn.Module, transforms: Iterable[Mapping[str, Any]]) -> None:
    """Replace the model's record."""
    model._adderkit_transforms = [dict(transform) for transform in transforms]  # type: ignore[assignment]


def forget_(model: nn.Module, paths: Collection[str], kinds: Collection[str]) -> list[str]:
    """Remove modules from the record, as if transforms of these kinds had never been applied to them.

    Args:
        model: The model whose record is changed.
        paths: Module paths to remove. A transform that is left without modules is dropped.
        kinds: Kinds of transforms to remove them from.

    Returns:
        Those of the paths whose weights had been folded.
    """
    left, folded = [], []
    for transform in transforms_of(model):
        if transform["kind"] in kinds:
            folded += [path for path in transform.get("folded", ()) if path in paths]
            lists: dict[str, Any] = {
                key: [path for path in transform[key] if path not in paths] for key in PATH_LISTS if key in transform
            }
            if TERMS in transform:
                lists[TERMS] = {path: number for path, number in transform[TERMS].items() if path not in paths}
            transform = {key: lists.get(key, value) for key, value in transform.items() if lists.get(key, True)}
            if not transform.get("modules"):
                continue
        left.append(transform)
    set_transforms_(model, left)
    return folded


def check_version(transform: Mapping[str, Any], expected: int) -> None:
    """Refuse a transform in a version that this release does not know.

    Raises:
        CheckpointError: The version is missing or another.
    """
    found = transform.get("version")
    if found != expected:
        raise CheckpointError(
            f"the {transform['kind']!r} transform has version {found!r:.40}, expected {expected}: "
            "install a newer adderkit"
        )


def model_form(model: nn.Module) -> ModelForm:
    """Return what the record says the model computes with: floats, simulated integers or integers."""
    forms = [_FORMS[transform["kind"]] for transform in transforms_of(model) if transform["kind"] in _FORMS]
    return forms[-1] if forms else "float"


def require_float(model: nn.Module, action: str, remedy: str) -> None:
    """Refuse a model that is quantized, or prepared for quantization-aware training.

    Args:
        model: Any model.
        action: Past participle of the verb that needs a float network, such as ``"pruned"``.
        remedy: What the user can do instead.

    Raises:
        AdderkitError: The model is not a plain float network.
    """
    form = model_form(model)
    if form != "float":
        raise AdderkitError(f"the model is {_WORDS[form]} and cannot be {action}: {remedy}")


def require_float_weights(model: nn.Module, action: str, remedy: str) -> None:
    """Refuse a quantized model. One that is prepared for quantization-aware training still has float weights.

    Args:
        model: Any model.
        action: Past participle of the verb that needs float weights, such as ``"trained"``.
        remedy: What the user can do instead.

    Raises:
        AdderkitError: The model is quantized.
    """
    if model_form(model) == "integer":
        require_float(model, action, remedy)
