"""What a calibration has done so far, in a file, so that one that was cut off goes on where it stopped."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import atomic_path

_logger = logging.getLogger(__name__)
_KEY = "adderkit-calibration"


class FittedLayer(NamedTuple):
    """A layer that was fitted: its fidelity on held-out images, and the range of each input channel.

    ``low`` and ``high`` are ``[G, 1, K]``, one value for each weight of a filter.
    """

    path: str
    correlation: float
    worst: float
    low: Tensor
    high: Tensor


class CalibrationState:
    """The file of an unfinished calibration; without a path nothing is kept.

    Args:
        path: Where it lies.
        settings: What the calibration depends on; a file with other settings is not continued.
        tensors: The same, as tensors: the images, and the weights of the student, not yet fitted, and of the teacher.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object], tensors: Sequence[Tensor]) -> None:
        self.path = path
        self._fingerprint = _fingerprint(settings, tensors) if path is not None else ""

    def restore(self, student: nn.Module, generator: torch.Generator) -> list[FittedLayer]:
        """Bring student and generator to where the file's calibration stopped; the layers that it had fitted."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                noted = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                if noted.get("fingerprint") != self._fingerprint:
                    return []
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError) as error:
            _logger.warning("%s is damaged (%s): calibration starts again", self.path, error)
            return []
        student.load_state_dict(
            {name.removeprefix("student."): value for name, value in tensors.items() if name.startswith("student.")}
        )
        generator.set_state(tensors["generator"])
        return [
            FittedLayer(path, correlation, worst, tensors[f"low.{path}"], tensors[f"high.{path}"])
            for path, correlation, worst in noted["layers"]
        ]

    def note(self, student: nn.Module, generator: torch.Generator, fitted: Sequence[FittedLayer]) -> None:
        """Write down what was done up to here, atomically."""
        if self.path is None:
            return
        tensors = {f"student.{name}": value.detach().cpu().clone() for name, value in student.state_dict().items()}
        tensors["generator"] = generator.get_state()
        for layer in fitted:
            tensors |= {f"low.{layer.path}": layer.low, f"high.{layer.path}": layer.high}
        noted = {
            "fingerprint": self._fingerprint,
            "layers": [(layer.path, layer.correlation, layer.worst) for layer in fitted],
        }
        with atomic_path(self.path) as temporary:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()}, temporary, {_KEY: json.dumps(noted)}
            )

    def remove(self) -> None:
        """The calibration is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _fingerprint(settings: Mapping[str, object], tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
