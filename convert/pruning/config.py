"""Configuration of pruning. Needs no torch."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..errors import AdderkitError
from ..patterns import check_keys, compile_pattern

CONFIG_VERSION = 1
Importance = Literal["variance", "batchnorm", "taylor", "magnitude", "random"]
NEED_IMAGES = ("variance", "taylor")


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Settings of ``prune_``. Give exactly one of ``ratio`` and ``target``.

    Args:
        ratio: Share of the channels to remove, between 0 and 1.
        target: Cost to keep, as a share of the model's current cost: ``mults=50%``, ``adds=…``, ``params=…`` or
            ``energy=…`` (energy of the arithmetic in fp32). The smallest ratio that reaches it is used.
        importance: Measure of importance; the channels with the smallest values are removed. The measures are
            described in ``importance.py``.
        global_pruning: Compare channels across layers. If false, each group of layers loses the same share.
        round_to: Number that the remaining channels of a layer are a multiple of, if it had as many.
        iterative: Number of rounds; importance is measured again in each.
        ignore: Patterns of modules that keep all their output channels, as in ``AdderConfig``.
        seed: Seed of random importance, sampled positions and sampled labels.
        version: Version of this configuration format.

    Example:
        >>> adderkit.prune_(model, adderkit.PruneConfig(target="adds=50%"), images)
        >>> adderkit.prune_(model, adderkit.PruneConfig(ratio=0.3, importance="magnitude", ignore=("layer4.*",)))
    """

    ratio: float | None = None
    target: str | None = None
    importance: Importance = "variance"
    global_pruning: bool = False
    round_to: int = 1
    iterative: int = 1
    ignore: tuple[str, ...] = ()
    seed: int = 0
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.target is None):
            raise AdderkitError("give either a ratio, such as 0.3, or a target, such as adds=50%")
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if self.ratio is not None and not (number and 0 < self.ratio < 1):
            raise AdderkitError(f"ratio is {self.ratio!r}, expected a number above 0 and below 1")
        if self.target is not None:
            parse_target(self.target)
        if self.importance not in get_args(Importance):
            raise AdderkitError(f"importance is {self.importance!r}, expected one of {', '.join(get_args(Importance))}")
        for name, least in (("round_to", 1), ("iterative", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise AdderkitError(f"{name} is {value!r}, expected a whole number of at least {least}")
        if not isinstance(self.global_pruning, bool):
            raise AdderkitError(f"global_pruning is {self.global_pruning!r}, expected true or false")
        ignore: Any = self.ignore
        if not isinstance(ignore, tuple) or not all(isinstance(pattern, str) for pattern in ignore):
            raise AdderkitError(f"ignore is {ignore!r:.80}, expected a tuple of patterns such as ('layer4.*',)")
        for pattern in self.ignore:
            compile_pattern(pattern)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping that ``from_dict`` reads."""
        return {**dataclasses.asdict(self), "ignore": list(self.ignore)}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "PruneConfig":
        """Read a mapping that ``to_dict`` wrote.

        Raises:
            AdderkitError: If a key is unknown, a value is invalid, or this release does not know the version.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "pruning configuration")
        ignore = mapping.get("ignore", ())
        if not isinstance(ignore, list | tuple):
            raise AdderkitError(f"ignore is {ignore!r:.80} in the pruning configuration, expected a list of patterns")
        return cls(**{**mapping, "ignore": tuple(ignore)})


def parse_target(text: str) -> tuple[str, float]:
    """Parse ``adds=50%`` to ``("adds", 0.5)``.

    Raises:
        AdderkitError: If the text has another form.
    """
    match = re.fullmatch(r"(mults|adds|params|energy)=(\d+(?:\.\d+)?)%", str(text).strip())
    if match is None or not 0 < float(match[2]) < 100:
        raise AdderkitError(
            f"target is {text!r}, expected the share of the cost to keep: mults=N%, adds=N%, params=N% or energy=N%"
        )
    return match[1], float(match[2]) / 100
