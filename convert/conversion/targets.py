"""Targets of a conversion: what ``--to`` may name, the layers that convolutions become, and what those layers support.

Importing this module does not import torch, so that the command line can list the targets quickly.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from ..errors import AdderkitError

if TYPE_CHECKING:
    from torch import nn

Capability = Literal["calibration", "pruning", "quantization", "adaptive_rate"]


class Site(NamedTuple):
    """Properties of a convolution that select the class of its converted layer.

    Args:
        same_padding: The convolution pads by the size of its input, as TensorFlow does.
        own_normalization: The layer gets a BatchNorm of its own.
    """

    same_padding: bool = False
    own_normalization: bool = False

    @property
    def words(self) -> str:
        """The site as error messages describe it."""
        parts = ["TensorFlow's padding"] * self.same_padding + ["a normalization of its own"] * self.own_normalization
        return " and ".join(parts) or "neither"


LayerClasses = Mapping[Site, "type[nn.Conv2d]"]


@dataclasses.dataclass(frozen=True)
class Target:
    """One target of a conversion.

    Args:
        name: Value of ``--to``, and kind of the transform in a model's record.
        load_classes: Import the layer classes and return them by site. Each is a subclass of ``nn.Conv2d`` without
            parameters of its own, since a conversion only changes the class of the module. ``Site()`` is required,
            and the other classes are subclasses of its class; a convolution at a site without a class is skipped.
            Classes with ``own_normalization`` implement ``OwnNormalization``, and those whose weights may have several
            terms ``SeveralTerms``.
        needs_normalization: Whether a layer only works where a normalization follows, so that ``plan`` inserts one.
        supports: What can be done with converted layers. Verbs refuse a model with layers that do not support them.
    """

    name: str
    load_classes: Callable[[], LayerClasses]
    needs_normalization: bool = False
    supports: frozenset[Capability] = frozenset()

    @property
    def has_terms(self) -> bool:
        """Whether weights of its layers may have several terms."""
        return all(issubclass(cls, SeveralTerms) for cls in self.classes.values())

    @functools.cached_property
    def classes(self) -> LayerClasses:
        """The layer classes by site."""
        return self.load_classes()

    def site_of(self, layer: "nn.Module") -> Site:
        """Return the site that the class of a layer of this target is for."""
        sites = {cls: site for site, cls in self.classes.items()}
        return next(sites[cls] for cls in type(layer).__mro__ if cls in sites)


@runtime_checkable
class OwnNormalization(Protocol):
    """A layer with a BatchNorm of its own, which a conversion adds and ``revert_`` takes away."""

    def insert_normalization_(self) -> None:
        """Add the BatchNorm to a layer that has just become one of this class."""

    def remove_normalization_(self) -> None:
        """Remove the BatchNorm before the layer becomes a convolution again."""


@runtime_checkable
class SeveralTerms(Protocol):
    """A layer whose weights may have several terms, as those of ``AdderConv2d``."""

    def set_terms_(self, terms: int) -> None:
        """Give each weight another number of terms, in place; all start with the values of the first."""


def _adder_classes() -> LayerClasses:
    from ...adder_layers import modules  # not at the top: imports torch
    from ...adder_layers.conv import AdderConv2d

    return {
        Site(): AdderConv2d,
        Site(same_padding=True): modules.AdderConv2dSame,
        Site(own_normalization=True): modules.NormalizedAdderConv2d,
        Site(same_padding=True, own_normalization=True): modules.NormalizedAdderConv2dSame,
    }


ADDER = "adder"
TARGETS: dict[str, Target] = {
    ADDER: Target(
        ADDER,
        _adder_classes,
        needs_normalization=True,  # an adder's output is negative and large
        supports=frozenset({"calibration", "pruning", "quantization", "adaptive_rate"}),
    ),
}


def target_named(name: str) -> Target:
    """Return a target by its name.

    Raises:
        AdderkitError: The name is unknown.
    """
    if name not in TARGETS:
        raise AdderkitError(f"target {name!r} is unknown, expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def target_of(layer: "nn.Module") -> Target | None:
    """Return the target that a layer was converted to, or ``None`` for any other module."""
    return next((target for target in TARGETS.values() if isinstance(layer, target.classes[Site()])), None)


def converted_layers(model: "nn.Module", capability: Capability | None = None) -> "dict[str, nn.Conv2d]":
    """Return the converted layers by path, in order of registration; a shared one once.

    Args:
        model: Any model.
        capability: Only layers whose target supports this.
    """
    found: dict[str, nn.Conv2d] = {}
    for path, module in model.named_modules():
        target = target_of(module)
        if target is not None and (capability is None or capability in target.supports):
            found[path] = module
    return found


def is_converted(model: "nn.Module") -> bool:
    """Return whether the model holds a converted layer."""
    return bool(converted_layers(model))


def require_support(model: "nn.Module", capability: Capability, remedy: str) -> None:
    """Refuse a model with layers whose target does not support a capability.

    Args:
        model: Any model.
        capability: What the layers have to support.
        remedy: What the user can do instead.

    Raises:
        AdderkitError: A converted layer does not support it.
    """
    for path, layer in converted_layers(model).items():
        target = target_of(layer)
        if target is not None and capability not in target.supports:
            raise AdderkitError(
                f"{path!r} was converted to {target.name!r}, which does not support {capability.replace('_', ' ')}: "
                f"{remedy}"
            )
