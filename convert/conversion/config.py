"""Configuration of a conversion: which convolutions become adder layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys, compile_pattern

CONFIG_VERSION = 1
Norm = Literal["insert", "skip", "error"]


@dataclasses.dataclass(frozen=True)
class AdderConfig:
    """What to convert. The default is the policy of the AdderNet papers: all but the first and the last layer.

    A pattern is a module path (``layer1.0.conv1``), a glob (``layer4.*``; ``*`` crosses dots) or ``re:`` and a regular
    expression that must match the whole path. ``exclude`` wins over ``include``.

    Args:
        include: Patterns of modules that may be converted.
        exclude: Patterns of modules that stay as they are.
        skip_first: Keep the first convolution; replacing it costs accuracy and saves little (AdderNet issue 60).
        skip_last: Keep the classifier where it is a convolution.
        skip_depthwise: Keep depthwise convolutions: they hold few of the multiplications and lose most (MobileNetV2).
        skip_gates: Keep convolutions on 1x1 maps that no normalization follows, as in squeeze-and-excite gates.
        norm: What to do with a convolution that no normalization follows: ``insert`` a BatchNorm2d, ``skip`` it, or
            ``error``. Before a GroupNorm or LayerNorm, which normalizes channels together, ``insert`` inserts one too.
        version: Version of this form.
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
        """A JSON-ready mapping that ``from_dict`` reads back."""
        return {**dataclasses.asdict(self), "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "AdderConfig":
        """Read what ``to_dict`` wrote.

        Raises:
            AdderkitError: An unknown key, a wrong type or a version this release does not know.
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
