"""How a model becomes integers: a frozen configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys

CONFIG_VERSION = 1
BITS = (8, 6, 5, 4)
Requant = Literal["fixed", "shift"]
FirstLast = Literal["int8", "fp32"]


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """What ``quantize`` makes.

    Args:
        bits: Of the operands of every weight layer but the first and the last, which take 8, as does an activation
            that only residual sums read.
        requant: From a layer's sums to the next bytes by an int32 multiplier and a shift (``fixed``), or by shifts
            alone (``shift``).
        first_last: The first convolution and the classifier in ``int8``, or in ``fp32`` around an integer body.
        version: Version of this form.
    """

    bits: int = 8
    requant: Requant = "fixed"
    first_last: FirstLast = "int8"
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise AdderkitError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, BITS))}")
        for name, allowed in (("requant", get_args(Requant)), ("first_last", get_args(FirstLast))):
            if getattr(self, name) not in allowed:
                raise AdderkitError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping that ``from_dict`` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "QuantizeConfig":
        """Read what ``to_dict`` wrote.

        Raises:
            AdderkitError: An unknown key, a wrong value or a version this release does not know.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "quantization configuration")
        return cls(**mapping)
