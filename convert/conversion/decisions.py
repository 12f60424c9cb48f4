"""Decision about one convolution: what makes it stay, what reads its output, and whether it needs a BatchNorm."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from ..errors import AdderkitError
from ..graph.computed_weights import not_its_own
from ..graph.layers import Layer, is_feature_extractor
from ..graph.observe import is_normalization, normalizes_each_channel
from ..patterns import matching
from .config import AdderConfig
from .converters import OTHER_CONVOLUTIONS, converter_of
from .targets import Site, Target, target_of

Decision = Literal["convert", "skip", "converted"]


class Verdict(NamedTuple):
    """Decision about one convolution.

    Args:
        decision: ``convert``, ``skip``, or ``converted`` if it is converted already.
        reason: Why, in words.
        inserts_norm: Whether converting inserts a BatchNorm2d.
    """

    decision: Decision
    reason: str
    inserts_norm: bool = False


class Successor(NamedTuple):
    """Reader of a convolution's output.

    Args:
        path: Path of the normalization that reads it; empty if none does.
        norm: That normalization.
        missing: Why the output is not simply normalized, in words; empty if it is.
    """

    path: str
    norm: nn.Module | None
    missing: str


def reason_to_skip(module: nn.Module, layer: Layer, config: AdderConfig) -> str | None:
    """Return why the layer is skipped whatever surrounds it, or ``None``."""
    if matching(config.include, layer.path) is None:
        return "matches no include pattern"
    pattern = matching(config.exclude, layer.path)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    if isinstance(module, nn.Conv2d) and target_of(module) is None:
        reason = not_its_own(module, layer.path)
        if reason:
            return reason
        if layer.weight_reader:
            return f"its weight is also read by {layer.weight_reader}() outside of the layer"
    if isinstance(module, nn.Conv2d) and converter_of(type(module)) is None:
        return f"{type(module).__name__} does more than a convolution"
    if type(module) in OTHER_CONVOLUTIONS:
        return OTHER_CONVOLUTIONS[type(module)]
    if config.skip_depthwise and isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return "depthwise"
    return None


def successor_of(layer: Layer, modules: Mapping[str, nn.Module]) -> Successor:
    """Find what reads the output of a convolution, by what was observed when the model ran."""
    path = next((path for path in layer.consumers if is_normalization(modules[path])), "")
    norm = modules[path] if path else None
    other = next((path for path in layer.consumers if not is_normalization(modules[path])), None)
    if other is not None:
        return Successor(path, norm, f"no normalization follows, but {type(modules[other]).__name__} {other!r}")
    function = next((name for name in layer.functions if name != "output"), None)
    if function is not None:
        return Successor(path, norm, f"no normalization follows, but {function}()")
    if norm is not None and not layer.functions:
        return Successor(path, norm, "")
    return Successor(path, norm, "no normalization follows, but the output" if path else "no normalization follows")


def shared_weights(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Map modules with a parameter that another module holds as well to that other module."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return {
        path: next(other for other in paths if other != path)
        for paths in owners.values()
        if len(set(paths)) > 1
        for path in paths
    }


def classifier_paths(model: nn.Module, layers: Sequence[Layer], modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths in what timm calls the classifier, or else the path of the last weight layer that runs.

    A feature extractor has no classifier: timm's is known by its ``feature_info``, others by the normalization that
    their last layer has before it returns a map. (AdderNet's classifier has one, too, but on a 1x1 map.)

    Args:
        model: Any model.
        layers: Its weight layers in order of execution.
        modules: Its modules by path.
    """
    timm_model: Any = model
    head = timm_model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = [part for part in (head if isinstance(head, list | tuple) else [head]) if isinstance(part, nn.Module)]
    if heads:
        inside = {module for part in heads for module in part.modules()}
        return {path for path, module in modules.items() if module in inside}
    if not layers or is_feature_extractor(model):
        return set()
    last = layers[-1]
    returns_map = last.output_shape[2:] != (1, 1) and successor_of(last, modules).norm is not None
    return set() if returns_map else {last.path}


def decide(
    module: nn.Module, layer: Layer, successor: Successor, config: AdderConfig, target: Target, reason: str | None
) -> Verdict:
    """Decide whether a convolution is converted.

    Args:
        module: The convolution.
        layer: Its shapes and readers.
        successor: What reads its output.
        config: Choice of the convolutions to convert.
        target: What it would become.
        reason: Why it is skipped whatever follows it, or ``None``.

    Raises:
        AdderkitError: A normalization is missing and ``config.norm`` is ``error``.
    """
    already = target_of(module)
    if already is not None:
        return Verdict("converted", f"converted to {already.name} already")
    if reason is not None:
        return Verdict("skip", reason)
    verdict = _by_successor(layer, successor, config, target)
    converter = converter_of(type(module))
    if verdict.decision == "convert" and isinstance(module, nn.Conv2d) and converter is not None:
        site = Site(converter.same_padding(module), verdict.inserts_norm)
        if site not in target.classes:
            return Verdict("skip", f"target {target.name} has no layer class with {site.words}")
    return verdict


def _by_successor(layer: Layer, successor: Successor, config: AdderConfig, target: Target) -> Verdict:
    missing = successor.missing
    if successor.norm is not None and not missing:
        found = type(successor.norm).__name__
        if config.norm != "insert" or not target.needs_normalization or normalizes_each_channel(successor.norm):
            return Verdict("convert", f"followed by {found}")
        reason = f"{found} {successor.path!r} normalizes channels together: BatchNorm2d inserted"
        return Verdict("convert", reason, inserts_norm=True)
    if config.skip_gates and layer.input_shape[-2:] == layer.output_shape[-2:] == (1, 1):
        return Verdict("skip", "on a 1x1 map without normalization, as in a gate")
    if not target.needs_normalization:
        return Verdict("convert", missing)
    if config.norm == "skip":
        return Verdict("skip", missing)
    if config.norm == "error":
        raise AdderkitError(
            f"{layer.path!r} would be converted to {target.name}, but {missing}: exclude it, "
            "or use norm='insert' or 'skip' (--norm)"
        )
    return Verdict("convert", f"{missing}: BatchNorm2d inserted", inserts_norm=True)
