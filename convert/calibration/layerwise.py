"""The adder layers are fitted one after the other, each on the inputs that it really gets in the converted network.

So a layer corrects what the layers before it got wrong; then the statistics of the BatchNorm behind it are measured
before the next layer is fitted.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...adder_layers.modules import NormalizedAdderConv2d
from ..graph.layers import Layer
from .config import CalibrationConfig
from .reconstruction import correlation, distances, input_ranges, reconstruct
from .sampling import draw_positions, layer_outputs, layer_windows
from .state import CalibrationState, FittedLayer

# One image in eight is kept aside: fidelity on the images that a layer was fitted to flatters it.
HELD_OUT = 8
# A fit holds its windows about four times: as sampled, in fp32, and laid out as image and as filters.
WINDOW_COPIES = 4

Progress = Callable[[str, int, int], None]


def fit_layers_(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Tensor],
    config: CalibrationConfig,
    generator: torch.Generator,
    state: CalibrationState,
    report: Progress,
) -> list[FittedLayer]:
    """Fit the layers in order, in place.

    Args:
        student: The converted model.
        teacher: The original network.
        layers: The student's adder layers in order of execution.
        batches: Images ``[n, C, H, W]``.
        config: Settings of the fit.
        generator: Source of positions and mini-batches.
        state: What an interrupted run has already done is taken from there, and every layer is noted there.
        report: Called as ``report(what, done, total)``.
    """
    total = sum(map(len, batches))
    positions = {}
    for layer in layers:
        count = positions_per_image(layer, student, total, config)
        positions[layer.path] = draw_positions(layer.output_shape, total, count, generator)
    fitted = state.restore(student, generator)
    report("layers", len(fitted), len(layers))
    for group in _groups(layers[len(fitted) :], positions, config.memory // 2):
        targets = layer_outputs(teacher, {layer.path: positions[layer.path] for layer in group}, batches)
        for layer in group:
            report(layer.path, len(fitted), len(layers))
            windows = layer_windows(student, layer.path, batches, positions[layer.path]).float()
            fitted.append(
                _fit(student, layer, windows, targets.pop(layer.path).float(), total, config.steps, generator)
            )
            state.note(student, generator, fitted)
    report("layers", len(layers), len(layers))
    return fitted


def positions_per_image(layer: Layer, student: nn.Module, images: int, config: CalibrationConfig) -> int:
    """As many as ``samples`` asks for, but not more than half of the memory holds."""
    module = student.get_submodule(layer.path)
    assert isinstance(module, nn.Conv2d)
    window = 4 * module.groups * module.weight[0].numel()
    allowed = config.memory // 2 // (WINDOW_COPIES * window * images)
    return max(1, min(-(-config.samples // images), allowed))


def _groups(layers: Sequence[Layer], positions: dict[str, Tensor], memory: int) -> Iterator[list[Layer]]:
    """Cut the layers into runs whose sampled outputs fit into ``memory`` bytes; each costs a pass of the teacher."""
    group: list[Layer] = []
    taken = 0
    for layer in layers:
        size = 4 * positions[layer.path].numel() * layer.output_shape[1]
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(layer)
        taken += size
    if group:
        yield group


def _fit(
    student: nn.Module,
    layer: Layer,
    windows: Tensor,
    target: Tensor,
    images: int,
    steps: int,
    generator: torch.Generator,
) -> FittedLayer:
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
    return FittedLayer(layer.path, float(fidelity.mean()), float(fidelity.min()), *input_ranges(windows, taps))


def _set_statistics(student: nn.Module, layer: Layer, module: nn.Conv2d, output: Tensor, target: Tensor) -> None:
    """Make the BatchNorms behind a layer fit what it now gives, its own among them; ``[G, S, O / G]`` twice."""
    flat, wanted = (values.permute(1, 0, 2).flatten(1) for values in (output, target))
    if isinstance(module, NormalizedAdderConv2d):
        own = module.normalization
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
