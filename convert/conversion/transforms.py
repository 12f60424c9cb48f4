"""Conversions in the record: transforms whose kind is a target or ``plain``, and the change of class they stand for."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import CheckpointError, NoModuleMatchedError
from ..record import PATH_LISTS, TERMS, Transform, check_version
from .config import MOST_TERMS
from .converters import ConvConverter, converter_of, fold_weight_, plain_class
from .reparameterize import guard_merges_
from .targets import TARGETS, OwnNormalization, SeveralTerms, Site, target_of

VERSION = 1
PLAIN = "plain"  # a folded layer that was reverted


def conversion_transform(
    kind: str, modules: Sequence[str], terms: Mapping[str, int] | None = None, **lists: Sequence[str]
) -> Transform:
    """Return the transform for the record; path lists and terms that are empty are left out."""
    filled: Transform = {key: list(value) for key, value in lists.items() if value}
    if terms:
        filled[TERMS] = dict(terms)
    return {"kind": kind, "version": VERSION, "modules": list(modules), **filled}


def check_conversion(transform: Mapping[str, Any]) -> None:
    """Refuse a malformed conversion.

    Raises:
        CheckpointError: The version is unknown, or a list of module paths is missing or malformed.
    """
    check_version(transform, VERSION)
    kind = transform["kind"]
    for key in PATH_LISTS:
        paths = transform.get(key, [])
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise CheckpointError(f"{key} is {paths!r:.80} in the {kind!r} transform, expected a list of module paths")
    modules, normalized = transform.get("modules"), transform.get("normalized", [])
    if not modules:
        raise CheckpointError(f"modules is {modules!r} in the {kind!r} transform, expected a list of module paths")
    if not set(normalized) <= set(modules):
        raise CheckpointError(
            f"normalized is {normalized!r:.80} in the {kind!r} transform, expected some of its modules"
        )
    _check_terms(transform.get(TERMS, {}), modules, kind)


def _check_terms(terms: object, modules: Sequence[str], kind: str) -> None:
    fits = isinstance(terms, Mapping) and all(
        path in modules and type(number) is int and 1 < number <= MOST_TERMS for path, number in terms.items()
    )
    if not fits:
        raise CheckpointError(
            f"terms is {terms!r:.80} in the {kind!r} transform, expected 2 to {MOST_TERMS} by path of its modules"
        )
    if terms and not (kind in TARGETS and TARGETS[kind].has_terms):
        raise CheckpointError(f"terms is {terms!r:.80} in the {kind!r} transform, whose weights have one term")


def apply_conversion_(model: nn.Module, transform: Mapping[str, Any]) -> None:
    """Apply a checked conversion to a model, in place.

    Raises:
        NoModuleMatchedError: A module does not exist or cannot be converted.
        CheckpointError: The transform claims to have folded other weights than it does.
    """
    kind, modules, normalized = transform["kind"], transform["modules"], transform.get("normalized", [])
    expected = [] if kind == PLAIN else check_modules(model, modules, kind, normalized)
    if transform.get("folded", []) != expected:
        raise CheckpointError(
            f"folded is {transform.get('folded', [])!r:.80} in the {kind!r} transform, "
            f"expected {expected!r:.80} for this base model"
        )
    change_classes_(model, modules, kind, normalized, transform.get(TERMS))


def change_classes_(
    model: nn.Module,
    paths: Sequence[str],
    kind: str,
    normalized: Collection[str] = (),
    terms: Mapping[str, int] | None = None,
) -> list[str]:
    """Change the class of modules, in place; all are checked before the first is changed.

    Args:
        model: The model to change.
        paths: Modules to change.
        kind: Name of the target, or ``plain``.
        normalized: Those of the paths that get a BatchNorm of their own.
        terms: Terms of the weights by path, where they are several.

    Returns:
        Those of the paths whose weights were folded.

    Raises:
        NoModuleMatchedError: A module does not exist or cannot be converted.
    """
    folded = check_modules(model, paths, kind, normalized)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        layer = modules[path]
        converter = converter_of(type(layer))
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(converter, ConvConverter)
        same_padding = converter.same_padding(layer)
        fold_weight_(layer, converter)
        if kind == PLAIN:
            layer.__class__ = plain_class(same_padding)
        else:
            layer.__class__ = TARGETS[kind].classes[Site(same_padding, path in normalized)]
        if isinstance(layer, OwnNormalization):
            layer.insert_normalization_()
        if terms and path in terms:
            assert isinstance(layer, SeveralTerms)
            layer.set_terms_(terms[path])
    guard_merges_(model)
    return folded


def restore_convolution_(layer: nn.Conv2d, original: nn.Conv2d) -> None:
    """Turn a converted layer back into the convolution that it was converted from, with its weights, in place.

    The layer keeps its mode, hooks, device and dtype.

    Args:
        layer: The converted layer.
        original: The convolution.
    """
    if isinstance(layer, OwnNormalization):
        layer.remove_normalization_()
    if isinstance(layer, SeveralTerms):
        layer.set_terms_(1)
    restored: Any = layer
    restored.__class__ = type(original)
    for name, value in (*vars(original).items(), *original.named_parameters(recurse=False)):
        if not hasattr(restored, name):  # dropped when the weight was folded
            setattr(restored, name, copy.deepcopy(value))
    restored.to(restored.weight.device, restored.weight.dtype).load_state_dict(original.state_dict())


def check_modules(model: nn.Module, paths: Sequence[str], kind: str, normalized: Collection[str] = ()) -> list[str]:
    """Refuse a change of class that does not fit the model; arguments are those of ``change_classes_``.

    Returns:
        Those of the paths whose weights the change would fold.

    Raises:
        NoModuleMatchedError: A module does not exist, is listed twice, or cannot be converted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[int] = set()
    folded = []
    for path in paths:
        module = modules.get(path)
        converter = None if module is None else converter_of(type(module))
        if converter is None or id(module) in seen or (kind == PLAIN and not converter.folds_weight):
            raise NoModuleMatchedError(
                f"{path!r} {_found(module, id(module) in seen)}, expected a convolution that can be converted: "
                "this plan is not for this model"
            )
        assert isinstance(module, nn.Conv2d)
        site = Site(converter.same_padding(module), path in normalized)
        if kind != PLAIN and site not in TARGETS[kind].classes:
            raise NoModuleMatchedError(f"{path!r} needs {site.words}, for which target {kind!r} has no layer class")
        if converter.folds_weight:
            folded.append(path)
        seen.add(id(module))
    return folded


def _found(module: nn.Module | None, seen: bool) -> str:
    if module is None:
        return "does not exist"
    return "is converted twice" if seen or target_of(module) is not None else f"is a {type(module).__name__}"
