"""Configuration of a conversion: the choice of convolutions to convert, and the terms of their weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys, compile_pattern, matching

CONFIG_VERSION = 1
MOST_TERMS = 8  # hold every 8-bit weight exactly
Norm = Literal["insert", "skip", "error"]


@dataclasses.dataclass(frozen=True)
class AdderConfig:
    """Choice of the convolutions to convert. By default all but the first and the last, as in the AdderNet papers.

    A pattern is a module path (``layer1.0.conv1``), a glob (``layer4.*``; ``*`` crosses dots) or ``re:`` and a regular
    expression that must match the whole path. ``exclude`` overrides ``include``.

    Example:
        >>> config = adderkit.AdderConfig(include=("layer[34].*",), exclude=("*.downsample.*",), skip_depthwise=True)
        >>> adderkit.convert_(model, config)

    Args:
        include: Patterns of modules that may be converted.
        exclude: Patterns of modules to keep.
        skip_first: Keep the first convolution; converting it costs accuracy and saves little (AdderNet issue 60).
        skip_last: Keep the classifier if it is a convolution.
        skip_depthwise: Keep depthwise convolutions: they have few of the multiplications and lose most (MobileNetV2).
        skip_gates: Keep convolutions on 1x1 maps that no normalization follows, as in squeeze-and-excite gates.
        norm: What to do with a convolution that no normalization follows: ``insert`` a BatchNorm2d, ``skip`` it, or
            raise an ``error``. ``insert`` also adds one before a GroupNorm or LayerNorm, which normalizes channels
            together.
        terms: Terms of each weight, 1 to 8: adder layers of the same input, combined by shifts, that follow the
            convolution more closely. One number, or numbers by pattern, of which the first that matches a layer counts;
            a layer that matches none has one term.
        version: Version of the configuration.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    skip_first: bool = True
    skip_last: bool = True
    skip_depthwise: bool = False
    skip_gates: bool = True
    norm: Norm = "insert"
    terms: int | Mapping[str, int] = 1
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise AdderkitError(f"{name} is {patterns!r}, expected a tuple of patterns such as ('layer4.*',)")
            object.__setattr__(self, name, tuple(patterns))
        if self.norm not in get_args(Norm):
            raise AdderkitError(f"norm is {self.norm!r}, expected one of {', '.join(get_args(Norm))}")
        _check_terms(self.terms)
        if not isinstance(self.terms, int):
            object.__setattr__(self, "terms", dict(self.terms))
        for pattern in (*self.include, *self.exclude, *self.term_patterns):
            compile_pattern(pattern)

    @property
    def term_patterns(self) -> tuple[str, ...]:
        """Patterns of ``terms``, in order; none if it is one number."""
        return () if isinstance(self.terms, int) else tuple(self.terms)

    def terms_of(self, path: str) -> int:
        """Return the number of terms of the weights of a layer, if it is converted."""
        if isinstance(self.terms, int):
            return self.terms
        pattern = matching(self.terms, path)
        return 1 if pattern is None else self.terms[pattern]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping that ``from_dict`` reads back; without ``terms`` where all weights have one."""
        values = {**dataclasses.asdict(self), "include": list(self.include), "exclude": list(self.exclude)}
        if self.terms == 1:
            del values["terms"]
        return values

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "AdderConfig":
        """Read a mapping that ``to_dict`` returned.

        Raises:
            AdderkitError: A key or the version is unknown, or a value has the wrong type.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "adder configuration")
        values = dict(mapping)
        for name in ("include", "exclude"):
            patterns = values.get(name, [])
            if not isinstance(patterns, list | tuple) or not all(isinstance(item, str) for item in patterns):
                raise AdderkitError(f"{name} is {patterns!r} in the adder configuration, expected a list of patterns")
            if name in values:
                values[name] = tuple(patterns)
        for name in ("skip_first", "skip_last", "skip_depthwise", "skip_gates"):
            if not isinstance(values.get(name, True), bool):
                raise AdderkitError(f"{name} is {values[name]!r} in the adder configuration, expected true or false")
        return cls(**values)


def parse_terms(texts: Sequence[str]) -> int | dict[str, int]:
    """Parse ``["2"]`` to 2, and ``["layer4.*=3", "2"]`` to ``{"layer4.*": 3, "*": 2}``.

    A number without a pattern is that of all layers that no pattern matches, wherever it stands.

    Raises:
        AdderkitError: A text has another form, or two are for the same layers.
    """
    found: dict[str, int] = {}
    for text in texts:
        pattern, separator, number = text.strip().rpartition("=")
        pattern = pattern if separator else "*"
        if not number.isascii() or not number.isdigit() or not pattern:
            raise AdderkitError(f"terms is {text!r}, expected a number such as 2, or PATTERN=N such as 'layer4.*=3'")
        if pattern in found:
            raise AdderkitError(f"terms is given twice for {pattern!r}, expected one number for each pattern")
        found[pattern] = int(number)
    others = {pattern: found.pop(pattern) for pattern in ("*",) if pattern in found}
    return {**found, **others} if found else others.get("*", 1)


def _check_terms(terms: object) -> None:
    for number in terms.values() if isinstance(terms, Mapping) else (terms,):
        if type(number) is not int or not 1 <= number <= MOST_TERMS:
            raise AdderkitError(
                f"terms is {terms!r:.80}, expected a whole number from 1 to {MOST_TERMS}, or such numbers by pattern"
            )
    if isinstance(terms, Mapping) and not (terms and all(isinstance(pattern, str) for pattern in terms)):
        raise AdderkitError(f"terms is {terms!r:.80}, expected numbers by pattern such as {{'layer4.*': 3}}")
