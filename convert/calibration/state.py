"""Progress of a calibration in a file, so that an interrupted calibration resumes where it stopped."""

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
    """A fitted layer: its fidelity on held-out images, and the range of its input channels.

    Args:
        path: Module path.
        correlation: Mean correlation with the convolution over output channels.
        worst: Smallest correlation of an output channel.
        low: Smallest input value for each weight of a filter, ``[G, 1, K]``.
        high: Largest input value for each weight of a filter, ``[G, 1, K]``.
    """

    path: str
    correlation: float
    worst: float
    low: Tensor
    high: Tensor


class CalibrationState:
    """File with the state of an unfinished calibration.

    Args:
        path: Path of the file; with ``None``, no state is kept.
        settings: Settings of the calibration. A file of a calibration with other settings is ignored.
        tensors: Images and initial weights of student and teacher. A file of a calibration with others is ignored.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object], tensors: Sequence[Tensor]) -> None:
        self.path = path
        self._fingerprint = _fingerprint(settings, tensors) if path is not None else ""

    @property
    def folder(self) -> Path | None:
        """The file's folder, if it exists."""
        return self.path.parent if self.path is not None and self.path.parent.is_dir() else None

    def restore(self, student: nn.Module, generator: torch.Generator) -> list[FittedLayer]:
        """Restore student and generator to the saved state, and return the layers fitted so far."""
        if self.path is None or not self.path.is_file():
            return []
        try:
            with safe_open(self.path, "pt") as file:
                saved = json.loads((file.metadata() or {}).get(_KEY, "{}"))
                if saved.get("fingerprint") != self._fingerprint:
                    _logger.warning("%s is from a calibration with other settings: calibration starts over", self.path)
                    return []
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError) as error:
            _logger.warning("%s is damaged (%s): calibration starts over", self.path, error)
            return []
        student.load_state_dict(
            {name.removeprefix("student."): value for name, value in tensors.items() if name.startswith("student.")}
        )
        generator.set_state(tensors["generator"])
        return [
            FittedLayer(path, correlation, worst, tensors[f"low.{path}"], tensors[f"high.{path}"])
            for path, correlation, worst in saved["layers"]
        ]

    def save(self, student: nn.Module, generator: torch.Generator, fitted: Sequence[FittedLayer]) -> None:
        """Save the state after the latest fitted layer, atomically."""
        if self.path is None:
            return
        tensors = {f"student.{name}": value.detach().cpu().clone() for name, value in student.state_dict().items()}
        tensors["generator"] = generator.get_state()
        for layer in fitted:
            tensors |= {f"low.{layer.path}": layer.low, f"high.{layer.path}": layer.high}
        saved = {
            "fingerprint": self._fingerprint,
            "layers": [(layer.path, layer.correlation, layer.worst) for layer in fitted],
        }
        with atomic_path(self.path) as temporary:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()}, temporary, {_KEY: json.dumps(saved)}
            )

    def remove(self) -> None:
        """Delete the file of a finished calibration."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _fingerprint(settings: Mapping[str, object], tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
