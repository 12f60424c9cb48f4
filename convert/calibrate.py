"""Calibration: without labels, the adder layers learn to answer like the convolutions they replace.

The layers are walked in order of execution. Each is fitted to the original network's outputs from the inputs it really
gets in the partly converted network, so that it corrects what the layers before it got wrong; then the statistics of
the BatchNorm behind it are measured before the next layer is fitted.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adder_layers.conv import AdderConv2d
from .batchnorm import reestimate_batchnorm_
from .capture import draw_positions, layer_outputs, layer_windows
from .errors import AdderkitError
from .graph import Layer, trace_layers
from .layers import NormalisedAdderConv2d
from .modes import evaluation_mode
from .reconstruct import correlation, distances, reconstruct
from .rewrite import adder_layers

# One image in eight is kept aside: fidelity on the images that a layer was fitted to flatters it.
HELD_OUT = 8

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """How well a calibrated layer follows its convolution, on images that were not used to fit it.

    Args:
        path: Module path.
        correlation: Mean over output channels of the correlation with the convolution's output.
        worst: The smallest of them.
    """

    path: str
    correlation: float
    worst: float


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What ``calibrate_`` did: settings, and a row for each adder layer in order of execution."""

    images: int
    samples: int
    steps: int
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
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Fit every adder layer of a converted model to the original network, in place. No labels are needed.

    Layer reconstruction with the true L1 subgradient, see ``reconstruct``. A normalisation that converting inserted
    gives each channel the mean and variance of the convolution's output. Afterwards all BatchNorm statistics are
    measured again on the images.

    Args:
        student: The converted model; its adder layers hold the convolutions' weights.
        teacher: The original network, with the same module paths.
        images: ``[N, C, H, W]`` normalised as the models expect, or batches of such. A few hundred do.
        steps: Adam steps for each layer; 0 only scales the weights.
        samples: Windows to fit a layer to, spread evenly over the images.
        batch_size: Images in a forward pass.
        seed: Of positions and mini-batches; the same seed gives the same weights.
        progress: Called as ``progress(what, done, total)``.

    Returns:
        Fidelity by layer.

    Raises:
        AdderkitError: No adder layer, too few images, or a teacher that is not this model's original.
    """
    adders = adder_layers(student)
    batches = batches_of(images, batch_size)
    total = sum(map(len, batches))
    if not adders:
        raise AdderkitError("the model has no adder layer to calibrate; run convert_ on it first")
    if total < 2 * HELD_OUT:
        raise AdderkitError(f"{total} calibration images are too few, expected at least {2 * HELD_OUT}")
    _check_teacher(adders, teacher)
    report = progress or (lambda what, done, total: None)
    with evaluation_mode(student, teacher):
        layers = [layer for layer in trace_layers(student, batches[0][:1]) if layer.path in adders]
        count = -(-samples // total)
        rows = _walk(student, teacher, layers, batches, count, steps, torch.Generator().manual_seed(seed), report)
        reestimate_batchnorm_(student, batches)
    return CalibrationReport(total, count * total, steps, seed, tuple(rows))


def _walk(
    student: nn.Module,
    teacher: nn.Module,
    layers: list[Layer],
    batches: list[Tensor],
    count: int,
    steps: int,
    generator: torch.Generator,
    report: Progress,
) -> list[LayerFidelity]:
    total = sum(map(len, batches))
    positions = {layer.path: draw_positions(layer.output_shape, total, count, generator) for layer in layers}
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        report("teacher", done, total)

    targets = layer_outputs(teacher, positions, batches, advance)
    rows = []
    for index, layer in enumerate(layers):
        report(layer.path, index, len(layers))
        windows = layer_windows(student, layer.path, batches, positions[layer.path])
        rows.append(_fit(student, layer, windows.float(), targets.pop(layer.path).float(), total, steps, generator))
    report("done", len(layers), len(layers))
    return rows


def _fit(
    student: nn.Module,
    layer: Layer,
    windows: Tensor,
    target: Tensor,
    images: int,
    steps: int,
    generator: torch.Generator,
) -> LayerFidelity:
    """Fit one layer, set its BatchNorm's statistics from the same samples, and measure it on the held-out images."""
    module = student.get_submodule(layer.path)
    assert isinstance(module, nn.Conv2d)
    held_out = windows.shape[1] // images * (images // HELD_OUT)
    fit, check = slice(0, -held_out), slice(-held_out, None)
    taps = module.kernel_size[0] * module.kernel_size[1]
    weight = module.weight.detach().float().cpu().reshape(module.groups, module.out_channels // module.groups, -1)
    fitted = reconstruct(windows[:, fit], target[:, fit], weight, taps, steps, generator)
    with torch.no_grad():
        module.weight.copy_(fitted.reshape(module.weight.shape))
        output = distances(windows, fitted)
        _set_statistics(student, layer, module, output, target)
        fidelity = correlation(output[:, check], target[:, check])
    return LayerFidelity(layer.path, float(fidelity.mean()), float(fidelity.min()))


def _set_statistics(student: nn.Module, layer: Layer, module: nn.Conv2d, output: Tensor, target: Tensor) -> None:
    """Make the BatchNorms behind a layer fit what it now gives, its own among them; ``[G, S, O / G]`` twice."""
    flat, wanted = (values.permute(1, 0, 2).flatten(1) for values in (output, target))
    if isinstance(module, NormalisedAdderConv2d):
        own = module.normalisation
        _set_running(own, flat)
        own.weight.copy_(wanted.std(0))
        own.bias.copy_(wanted.mean(0))  # the convolution's bias is in there
        return
    if module.bias is not None:
        flat = flat + module.bias.detach().float().cpu()
    for path in layer.consumers:
        norm = student.get_submodule(path)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            _set_running(norm, flat)


def _set_running(norm: nn.modules.batchnorm._BatchNorm, values: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(values.mean(0))
    norm.running_var.copy_(values.var(0))


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
