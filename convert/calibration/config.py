"""Configuration of calibration, and policies for the layers: their terms, or convolutions. Needs no torch."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import AdderkitError
from ..patterns import check_keys

CONFIG_VERSION = 1


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
    """Settings of ``calibrate_``.

    Args:
        steps: Adam steps for each layer; 0 only places the terms of its weights (``start.py``).
        samples: Windows to fit each layer to, spread evenly over the images.
        matching_steps: Steps of the joint fit of all layers; 0 skips it.
        batch_size: Images in a forward pass.
        memory: Bytes that the sampled windows and outputs, and the activations of the joint fit, may take. If that is
            too little for ``samples`` or for a joint fit with 64 images, fewer are used. Activations that wait for the
            next layer's fit may take half of it; the others are kept in temporary files.
        seed: Seed of the sampled positions and mini-batches; the same seed gives the same weights.
        version: Version of this configuration format.

    Example:
        >>> config = adderkit.CalibrationConfig(steps=100, matching_steps=0)
        >>> adderkit.calibrate_(student, teacher, images, config)
    """

    steps: int = 240
    samples: int = 16384
    matching_steps: int = 120
    batch_size: int = 64
    memory: int = 2 << 30
    seed: int = 0
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        least = {"samples": 1, "batch_size": 2, "memory": 1}  # a BatchNorm has no statistics of a single image
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int or value < least.get(name, 0):
                raise AdderkitError(
                    f"{name} is {value!r:.80}, expected a whole number of at least {least.get(name, 0)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping that ``from_dict`` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "CalibrationConfig":
        """Read a mapping that ``to_dict`` wrote.

        Raises:
            AdderkitError: If a key is unknown, a value is invalid, or this release does not know the version.
        """
        check_keys(cls, mapping, CONFIG_VERSION, "calibration configuration")
        return cls(**mapping)


@dataclasses.dataclass(frozen=True)
class HybridPolicy:
    """Rules for returning calibrated layers to convolutions.

    Args:
        min_fidelity: Return each layer whose output correlates less than this with the convolution's; from 0 to 1.
        budget: Share of the original network's multiplications that the hybrid may use, from 0 to 1. As many layers
            return as fit, starting with those that lose most fidelity per multiplication saved.
    """

    min_fidelity: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value <= 1:
                raise AdderkitError(f"{name} is {value}, expected a number from 0 to 1")

    @property
    def acts(self) -> bool:
        """Whether any layer may return to a convolution."""
        return self.min_fidelity is not None or self.budget is not None


@dataclasses.dataclass(frozen=True)
class TermPolicy:
    """Aim of the choice of terms. Layers get terms, best fidelity per addition first, until the first aim is met.

    Args:
        fidelity: Mean fidelity of all adder layers to reach, from 0 to 1.
        additions: Additions that the network may use, as a multiple of those with one term in each layer; at least 1.
    """

    fidelity: float | None = None
    additions: float | None = None

    def __post_init__(self) -> None:
        if self.fidelity is None and self.additions is None:
            raise AdderkitError("the choice of terms needs an aim, such as a fidelity of 0.98 or additions of 1.25")
        if self.fidelity is not None and not 0 <= self.fidelity <= 1:
            raise AdderkitError(f"fidelity is {self.fidelity}, expected a number from 0 to 1")
        if self.additions is not None and not self.additions >= 1:
            raise AdderkitError(
                f"additions is {self.additions}, expected at least 1: those with one term in each layer"
            )


class Budget(NamedTuple):
    """Operations that a network may use, as shares: 0.3 for 30 %.

    Args:
        multiplications: Share of the original network's.
        additions: Share of those of the adder network with one term in each layer.
    """

    multiplications: float | None = None
    additions: float | None = None


def parse_budget(text: str) -> Budget:
    """Parse ``mults=30%``, ``adds=125%`` or ``mults=30%,adds=125%``.

    Raises:
        AdderkitError: If the text has another form.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(mults|adds)=(\d+(?:\.\d+)?)%", part.strip())
        share = float(match[2]) / 100 if match else 0.0
        if match is None or match[1] in found or (share > 1 if match[1] == "mults" else share < 1):
            raise AdderkitError(
                f"budget is {text!r}, expected mults=N% with N from 0 to 100, adds=N% with N of at least 100, or both: "
                "mults=30%,adds=125%"
            )
        found[match[1]] = share
    return Budget(found.get("mults"), found.get("adds"))
