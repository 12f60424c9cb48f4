"""Configuration of a quantization."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys

CONFIG_VERSION = 1
Bits = Literal[8, 6, 5, 4]
BITS: tuple[int, ...] = get_args(Bits)
Requant = Literal["fixed", "shift"]
FirstLast = Literal["int8", "fp32"]


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Settings of ``quantize``.

    Args:
        bits: Bits of the operands of every weight layer except the first and the last, which have 8 bits, as does an
            activation that only residual sums read: 8, 6, 5 or 4.
        requant: Conversion of a layer's sums to bytes, with an int32 multiplier and a shift (``fixed``) or with shifts
            alone (``shift``).
        first_last: Compute the first convolution and the classifier in ``int8``, or in ``fp32``.
        version: Version of this format.

    Example:
        >>> config = adderkit.QuantizeConfig(bits=6, requant="shift")
        >>> network = adderkit.quantize(model, images, config)
    """

    bits: Bits = 8
    requant: Requant = "fixed"
    first_last: FirstLast = "int8"
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        bits: Any = self.bits
        if type(bits) is not int or bits not in BITS:
            raise AdderkitError(f"bits is {bits!r}, expected one of {', '.join(map(str, BITS))}")
        for name, allowed in (("requant", get_args(Requant)), ("first_last", get_args(FirstLast))):
            if getattr(self, name) not in allowed:
                raise AdderkitError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping that ``from_dict`` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "QuantizeConfig":
        """Read the result of ``to_dict``.

        Raises:
            AdderkitError: An unknown key, an invalid value, or a version that this release does not support.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "quantization configuration")
        return cls(**mapping)
