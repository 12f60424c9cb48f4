"""Configuration of a conversion: the choice of convolutions to convert."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys, compile_pattern

CONFIG_VERSION = 1
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
        version: Version of the configuration.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    skip_first: bool = True
    skip_last: bool = True
    skip_depthwise: bool = False
    skip_gates: bool = True
    norm: Norm = "insert"
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise AdderkitError(f"{name} is {patterns!r}, expected a tuple of patterns such as ('layer4.*',)")
            object.__setattr__(self, name, tuple(patterns))
        if self.norm not in get_args(Norm):
            raise AdderkitError(f"norm is {self.norm!r}, expected one of {', '.join(get_args(Norm))}")
        for pattern in (*self.include, *self.exclude):
            compile_pattern(pattern)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping that ``from_dict`` reads back."""
        return {**dataclasses.asdict(self), "include": list(self.include), "exclude": list(self.exclude)}

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
