"""Label-free calibration: fit each adder layer to the output of the convolution it replaces.

Layers are fitted one by one (``layerwise.py``), then all together so that the outputs of whole blocks match
(``blockwise.py``).
"""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.geometry import terms_first
from ...adder_layers.modules import adder_layers
from ..conversion.targets import require_support
from ..errors import AdderkitError
from ..graph.computed_weights import computed_weight
from ..graph.layers import trace_layers
from ..graph.modes import batches_of, device_of, eval_mode, move_like
from ..record import require_float
from ..wrappers import unwrapped
from .batchnorm import reestimate_batchnorm_
from .batchnorm_shift import calibration_statistics
from .blockwise import match_blocks_
from .config import CalibrationConfig
from .layerwise import HELD_OUT, fit_layers_, positions_per_image
from .state import CalibrationState, FittedLayer
from .workload import Progress, Workload

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """Fidelity of a calibrated layer to its convolution, on images that were not used to fit it.

    Args:
        path: Module path.
        correlation: Mean over output channels of the correlation with the convolution's output, after the fit of this
            layer alone.
        worst: Smallest correlation of any output channel.
        beyond_range: Share of the finished layer's weights outside the range of their input channel. There
            ``-|x - w|`` is ``x`` or ``-x`` plus a constant, so this share of the layer does not compute an L1 distance.
    """

    path: str
    correlation: float
    worst: float
    beyond_range: float


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """Result of ``calibrate_``.

    Args:
        config: Settings of the calibration.
        images: Calibration images that were used.
        samples: Windows that each layer was fitted to; if memory limited them, the smallest number of any layer.
        layers: Fidelity of each adder layer, in order of execution.
        device: Device on which everything was computed.
    """

    config: CalibrationConfig
    images: int
    samples: int
    layers: tuple[LayerFidelity, ...]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return dataclasses.asdict(self)


def calibrate_(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor | Iterable[Tensor],
    config: CalibrationConfig = CalibrationConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit every adder layer of a converted model to the original network, in place. No labels are needed.

    Everything is computed on the device of the two models.

    Each layer is fitted on its own with the true L1 subgradient (``reconstruct``), then all layers are fitted together
    (``match_blocks_``). A normalization that the conversion inserted gives each channel the mean and variance of the
    convolution's output. Finally all BatchNorm statistics are re-estimated on the images, so that the output of each
    BatchNorm for them has the mean and variance of the teacher's (``calibration_statistics``).

    Args:
        student: The converted model; its adder layers hold the convolutions' weights.
        teacher: The original network, with the same module paths.
        images: ``[N, C, H, W]``, normalized as the models expect, or batches of such images. A few hundred are enough.
        config: Settings of the fit.
        state: File that records the finished layers. A call that finds it there with the same settings, images, student
            and teacher resumes after the last of them, with the same result; the file is removed at the end.
        progress: Called as ``progress(what, done, total)``, where ``what`` is next: a layer, ``all layers`` for a step
            of the joint fit, or ``statistics``; ``done`` of ``total`` is the estimated share of the whole work.

    Returns:
        The fidelity of each layer.

    Raises:
        AdderkitError: If there is no adder layer, there are too few images, or the teacher is not the network that was
            converted.

    Example:
        >>> teacher = timm.create_model("resnet18", pretrained=True)
        >>> student = copy.deepcopy(teacher)
        >>> adderkit.convert_(student)
        >>> report = adderkit.calibrate_(student, teacher, images)
        >>> min(report.layers, key=lambda layer: layer.correlation).path
        'layer4.1.conv2'
    """
    student, teacher = unwrapped(student), unwrapped(teacher)
    require_float(student, "calibrated", "calibrate the network that it was made from")
    require_support(student, "calibration", "fine-tune the model instead")
    adders = adder_layers(student)
    batches = batches_of(images, config.batch_size)
    total = sum(map(len, batches))
    _check_arguments(adders, teacher, total)
    _check_devices(student, teacher)
    _check_hooks(student, adders, batches[0][:1])
    _warn_of_another_teacher(student, teacher)
    generator = torch.Generator().manual_seed(config.seed)
    own = student.state_dict()
    settings = {"config": config.to_dict(), "layers": list(adders), "tensors": list(own)}
    unfinished = CalibrationState(state, settings, [*batches, *own.values(), *teacher.state_dict().values()])
    with eval_mode(student, teacher), calibration_statistics(student, teacher, batches):
        layers = [layer for layer in trace_layers(student, batches[0][:1]) if layer.path in adders]
        report = Workload(student, layers, config, total, progress or (lambda what, done, total: None)).report
        fitted = fit_layers_(student, teacher, layers, batches, config, generator, unfinished, report)
        # Held-out images stay out of the joint fit too, so that fidelity is always measured on unseen images.
        seen = torch.cat(batches)[: total - total // HELD_OUT]
        match_blocks_(student, teacher, seen, config, generator=generator, progress=report)
        report("statistics", 0, 1)
        reestimate_batchnorm_(student, batches)
        report("statistics", 1, 1)
    unfinished.remove()
    rows = tuple(_fidelity(layer, adders[layer.path].weight) for layer in fitted)
    windows = total * min(positions_per_image(layer, student, total, config) for layer in layers)
    return CalibrationReport(config, total, windows, rows, str(device_of(student)))


def _fidelity(layer: FittedLayer, weight: Tensor) -> LayerFidelity:
    first = terms_first(weight.detach().float().cpu())
    grouped = first.reshape(len(first), layer.low.shape[0], -1, layer.low.shape[2])  # [T, G, O / G, K]
    beyond = (grouped <= layer.low) | (grouped >= layer.high)
    return LayerFidelity(layer.path, layer.correlation, layer.worst, float(beyond.float().mean()))


def _check_devices(student: nn.Module, teacher: nn.Module) -> None:
    own, other = device_of(student), device_of(teacher)
    if own != other:
        raise AdderkitError(f"the student is on {own} and the teacher on {other}, expected one device for both")


@torch.no_grad()
def _check_hooks(student: nn.Module, adders: dict[str, AdderConv2d], image: Tensor) -> None:
    """Refuse layers whose weight is set by something in each forward pass, which would overwrite the fit."""
    for path, layer in adders.items():
        if "weight" not in layer._parameters or computed_weight(layer):
            raise AdderkitError(
                f"{path!r} cannot be fitted: {computed_weight(layer) or 'its weight is not a parameter'}"
            )
    hooked = {path: layer for path, layer in adders.items() if layer._forward_pre_hooks}
    if not hooked:
        return
    kept = {path: layer.weight.clone() for path, layer in hooked.items()}
    try:
        for layer in hooked.values():
            layer.weight.add_(1)
        with eval_mode(student):
            student(move_like(image, student))
        changed = next((path for path, layer in hooked.items() if not torch.equal(layer.weight, kept[path] + 1)), None)
    finally:
        for path, layer in hooked.items():
            layer.weight.copy_(kept[path])
    if changed is not None:
        raise AdderkitError(
            f"a forward pre-hook of {changed!r} sets its weight, which would overwrite the fit: remove the hook first"
        )


def _warn_of_another_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Log a warning if no layer that was left as it is has the teacher's weight: it is probably another network."""
    originals = dict(teacher.named_modules())
    kept = {
        path: torch.equal(layer.weight.cpu(), original.weight.cpu())
        for path, layer in student.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
        and isinstance(original := originals.get(path), type(layer))
        and not isinstance(layer, AdderConv2d)
    }
    if kept and not any(kept.values()):
        _logger.warning(
            "the teacher has other weights in every layer that was not converted, such as %r: pass a copy of the model "
            "from before the conversion, unless this is intended",
            next(iter(kept)),
        )


def _check_arguments(adders: dict[str, AdderConv2d], teacher: nn.Module, images: int) -> None:
    if not adders:
        raise AdderkitError("the model has no adder layer to calibrate; run convert_ on it first")
    if images < 2 * HELD_OUT:
        raise AdderkitError(f"{images} calibration images are too few, expected at least {2 * HELD_OUT}")
    modules = dict(teacher.named_modules())
    for path, adder in adders.items():
        original = modules.get(path)
        if not isinstance(original, nn.Conv2d) or isinstance(original, AdderConv2d):
            found = f"a {type(original).__name__}" if original is not None else "nothing"
            raise AdderkitError(f"the teacher has {found} at {path!r}, expected the Conv2d that was converted")
        if original.weight.shape != terms_first(adder.weight).shape[1:]:
            raise AdderkitError(
                f"the teacher's {path!r} has weights of shape {tuple(original.weight.shape)}, expected "
                f"{tuple(adder.weight.shape)} as in the student: pass the network that was converted"
            )
