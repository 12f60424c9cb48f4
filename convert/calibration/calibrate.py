"""Calibration: without labels, the adder layers learn to answer like the convolutions they replace.

First layer by layer (``layerwise.py``), then all together so that whole blocks answer alike (``blockwise.py``).
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.modules import adder_layers
from ..errors import AdderkitError
from ..graph.layers import trace_layers
from ..graph.modes import eval_mode
from ..quantization.record import refuse_integers
from .batchnorm import reestimate_batchnorm_
from .batchnorm_shift import calibration_statistics
from .blockwise import match_blocks_
from .layerwise import HELD_OUT, Fit, Progress, fit_layers_, positions_per_image
from .state import CalibrationState, FittedLayer

MEMORY = 2 << 30


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """How well a calibrated layer follows its convolution, on images that were not used to fit it.

    Args:
        path: Module path.
        correlation: Mean over output channels of the correlation with the convolution's output, after the layer's own
            fit.
        worst: The smallest of them.
        beyond_range: Share of the finished layer's weights that no value of their input channel passes: there
            ``-|x - w|`` is plainly ``x`` or ``-x`` and a constant, so this share of the layer is not L1 at all.
    """

    path: str
    correlation: float
    worst: float
    beyond_range: float


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate_`` did: settings, and a row for each adder layer in order of execution.

    ``samples`` is the number of windows that a layer was fitted to; where memory was too little, the smallest of them.
    """

    images: int
    samples: int
    steps: int
    matching_steps: int
    seed: int
    layers: tuple[LayerFidelity, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return dataclasses.asdict(self)


def calibrate_(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    steps: int = 240,
    samples: int = 16384,
    matching_steps: int = 120,
    batch_size: int = 64,
    memory: int = MEMORY,
    seed: int = 0,
    state: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit every adder layer of a converted model to the original network, in place. No labels are needed.

    Layer reconstruction with the true L1 subgradient, see ``reconstruct``; then all layers together, see
    ``match_blocks_``. A normalization that converting inserted gives each channel the mean and variance of the
    convolution's output. Afterwards all BatchNorm statistics are measured again on the images, so that what a
    BatchNorm gives for them has the mean and variance of the teacher's, see ``calibration_statistics``.

    Args:
        student: The converted model; its adder layers hold the convolutions' weights.
        teacher: The original network, with the same module paths.
        images: ``[N, C, H, W]`` normalized as the models expect, or batches of such. A few hundred do.
        steps: Adam steps for each layer; 0 only scales the weights.
        samples: Windows to fit a layer to, spread evenly over the images.
        matching_steps: Steps of the joint fit; 0 leaves it out.
        batch_size: Images in a forward pass.
        memory: Bytes that captured windows and outputs, and the activations of the joint fit, may take. Where that is
            too little for ``samples`` or a batch of 64, fewer are used.
        seed: Of positions and mini-batches; the same seed gives the same weights.
        state: A file to note finished layers in. A run that finds it there, with the same settings, images, student
            and teacher, goes on behind the last of them, to the same result; it is removed at the end.
        progress: Called as ``progress(what, done, total)``.

    Returns:
        Fidelity by layer.

    Raises:
        AdderkitError: No adder layer, too few images, or a teacher that is not this model's original.
    """
    refuse_integers(student, "calibrated: calibrate the network that it was made from", imitated=True)
    adders = adder_layers(student)
    batches = batches_of(images, batch_size)
    total = sum(map(len, batches))
    if not adders:
        raise AdderkitError("the model has no adder layer to calibrate; run convert_ on it first")
    if total < 2 * HELD_OUT:
        raise AdderkitError(f"{total} calibration images are too few, expected at least {2 * HELD_OUT}")
    _check_teacher(adders, teacher)
    report = progress or (lambda what, done, total: None)
    fit, generator = Fit(steps, samples, memory), torch.Generator().manual_seed(seed)
    own = student.state_dict()
    settings = {**fit._asdict(), "seed": seed, "layers": list(adders), "tensors": list(own)}
    notes = CalibrationState(state, settings, [*batches, *own.values(), *teacher.state_dict().values()])
    with eval_mode(student, teacher), calibration_statistics(student, teacher, batches):
        layers = [layer for layer in trace_layers(student, batches[0][:1]) if layer.path in adders]
        fitted = fit_layers_(student, teacher, layers, batches, fit, generator, notes, report)
        # The held-out images stay unseen, so that what is measured on them stays honest.
        seen = torch.cat(batches)[: total - total // HELD_OUT]
        match_blocks_(student, teacher, seen, steps=matching_steps, memory=memory, generator=generator, progress=report)
        reestimate_batchnorm_(student, batches)
    notes.remove()
    rows = tuple(_fidelity(layer, adders[layer.path].weight) for layer in fitted)
    windows = total * min(positions_per_image(layer, student, total, fit) for layer in layers)
    return CalibrationReport(total, windows, steps, matching_steps, seed, rows)


def _fidelity(layer: FittedLayer, weight: Tensor) -> LayerFidelity:
    grouped = weight.detach().float().cpu().reshape(layer.low.shape[0], -1, layer.low.shape[2])  # [G, O / G, K]
    beyond = (grouped <= layer.low) | (grouped >= layer.high)
    return LayerFidelity(layer.path, layer.correlation, layer.worst, float(beyond.float().mean()))


def batches_of(images: Tensor | Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """Batches of nearly the same size: a last one of a single image would upset a BatchNorm on the logits."""
    if not isinstance(images, Tensor):
        parts = [batch.cpu() for batch in images]
        images = torch.cat(parts) if parts else torch.empty(0)
    return list(images.tensor_split(max(1, -(-len(images) // batch_size))))


def _check_teacher(adders: dict[str, Any], teacher: nn.Module) -> None:
    modules = dict(teacher.named_modules())
    for path, adder in adders.items():
        original = modules.get(path)
        if not isinstance(original, nn.Conv2d) or isinstance(original, AdderConv2d):
            found = f"a {type(original).__name__}" if original is not None else "nothing"
            raise AdderkitError(f"the teacher has {found} at {path!r}, expected the Conv2d that the student converted")
        if original.weight.shape != adder.weight.shape:
            raise AdderkitError(
                f"the teacher's {path!r} has weights of shape {tuple(original.weight.shape)}, expected "
                f"{tuple(adder.weight.shape)} as in the student: give the network that was converted"
            )
