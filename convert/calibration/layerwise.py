"""Fit adder layers one by one, each on the inputs that it receives in the converted network.

So a layer also compensates for the errors of the layers before it. The statistics of the BatchNorm after it are
re-estimated before the next layer is fitted.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...adder_layers.geometry import terms_first
from ...adder_layers.modules import NormalizedAdderConv2d
from ..graph.layers import Layer
from ..graph.modes import device_of
from ..graph.passes import SteppedPasses, has_storages
from ..graph.stepwise import stepped_graph
from .config import CalibrationConfig
from .reconstruction import correlation, distances, input_ranges, reconstruct
from .sampling import draw_positions, layer_inputs, layer_outputs, sample_outputs, sample_windows
from .state import CalibrationState, FittedLayer
from .workload import Progress

# One image in eight is held out: fidelity on the images that a layer was fitted to would be too optimistic.
HELD_OUT = 8
# A fit holds about four copies of its windows: as sampled, in fp32, and in the layouts of an image and of filters.
WINDOW_COPIES = 4


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
        generator: Random generator of positions and mini-batches.
        state: State of an interrupted call, from which layers are restored and to which every layer is saved.
        report: Called as ``report(what, done, total)``.

    Returns:
        The fitted layers, in order of execution.
    """
    total = sum(map(len, batches))
    positions = {}
    for layer in layers:
        count = positions_per_image(layer, student, total, config)
        positions[layer.path] = draw_positions(layer.output_shape, total, count, generator)
    fitted = state.restore(student, generator)
    report("layers", len(fitted), len(layers))
    rest = layers[len(fitted) :]
    sample = _sample_source(student, teacher, rest, positions, batches, config.memory // 2, state)
    for layer in rest:
        report(layer.path, len(fitted), len(layers))
        windows, target = sample(layer)
        fitted.append(_fit(student, layer, windows, target, total, config.steps, generator))
        state.save(student, generator, fitted)
    report("layers", len(layers), len(layers))
    return fitted


def _sample_source(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[Layer],
    positions: dict[str, Tensor],
    batches: Sequence[Tensor],
    memory: int,
    state: CalibrationState,
) -> Callable[[Layer], tuple[Tensor, Tensor]]:
    """Return a function that samples a layer's windows in the student and outputs in the teacher.

    It is called for the layers in order, each after the fit of the one before. If both networks can run step by step,
    one pass of each serves all layers. Otherwise each layer takes a pass of the student, and as many layers as fit into
    memory take one of the teacher.
    """
    changes = {layer.path: layer.consumers for layer in layers}
    graph = stepped_graph(student, changes, batches[0][:2])
    original = stepped_graph(teacher, dict.fromkeys(changes, ()), batches[0][:2])
    if graph is None or original is None or not has_storages(device_of(student)):
        return _separate_passes(student, teacher, layers, positions, batches, memory)
    ours = SteppedPasses(student, graph, batches, memory // 2, state.folder)
    theirs = SteppedPasses(teacher, original, batches, memory // 2, state.folder)

    def sample(layer: Layer) -> tuple[Tensor, Tensor]:
        chosen, module = positions[layer.path], _convolution(student, layer)
        windows = sample_windows(module, ours.inputs(layer.path), chosen).float()
        return windows, sample_outputs(module, theirs.outputs(layer.path), chosen).to(windows)

    return sample


def _separate_passes(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[Layer],
    positions: dict[str, Tensor],
    batches: Sequence[Tensor],
    memory: int,
) -> Callable[[Layer], tuple[Tensor, Tensor]]:
    targets: dict[str, Tensor] = {}

    def sample(layer: Layer) -> tuple[Tensor, Tensor]:
        if layer.path not in targets:
            group = next(group for group in _groups(layers, positions, memory) if layer in group)
            targets.update(layer_outputs(teacher, {each.path: positions[each.path] for each in group}, batches))
        inputs = layer_inputs(student, layer.path, batches)
        windows = sample_windows(_convolution(student, layer), inputs, positions[layer.path]).float()
        return windows, targets.pop(layer.path).to(windows)

    return sample


def _convolution(model: nn.Module, layer: Layer) -> nn.Conv2d:
    module = model.get_submodule(layer.path)
    assert isinstance(module, nn.Conv2d)
    return module


def positions_per_image(layer: Layer, student: nn.Module, images: int, config: CalibrationConfig) -> int:
    """Return the number of windows per image: enough for ``config.samples``, within half of ``config.memory``."""
    module = _convolution(student, layer)
    window = 4 * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    allowed = config.memory // 2 // (WINDOW_COPIES * window * images)
    return max(1, min(-(-config.samples // images), allowed))


def _groups(layers: Sequence[Layer], positions: dict[str, Tensor], memory: int) -> Iterator[list[Layer]]:
    """Group layers whose sampled outputs fit into ``memory`` bytes; each group takes one pass of the teacher."""
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
    """Fit one layer, set the statistics of its BatchNorm, and measure its fidelity on the held-out images.

    Args:
        student: The converted model.
        layer: The layer to fit.
        windows: Windows of its input, ``[G, S, K]``.
        target: Outputs of the convolution at the same positions, ``[G, S, O / G]``.
        images: Number of images, each with the same number of windows.
        steps: Adam steps.
        generator: Random generator of the mini-batches.
    """
    module = _convolution(student, layer)
    held_out = windows.shape[1] // images * (images // HELD_OUT)
    fit, check = slice(0, -held_out), slice(-held_out, None)
    taps = module.kernel_size[0] * module.kernel_size[1]
    first = terms_first(module.weight.detach())
    weight = first[0].float().reshape(module.groups, module.out_channels // module.groups, -1)
    fitted = reconstruct(windows[:, fit], target[:, fit], weight, taps, steps, generator, len(first))
    with torch.no_grad():
        first.copy_(fitted.permute(2, 0, 1, 3).reshape(first.shape))
        output = distances(windows, fitted)
        _set_statistics(student, layer, module, output, target)
        fidelity = correlation(output[:, check], target[:, check])
    ranges = (each.cpu() for each in input_ranges(windows, taps))  # kept with the state, whatever the device
    return FittedLayer(layer.path, float(fidelity.mean()), float(fidelity.min()), *ranges)


def _set_statistics(student: nn.Module, layer: Layer, module: nn.Conv2d, output: Tensor, target: Tensor) -> None:
    """Set the statistics of the BatchNorms after a layer, and of one inserted in it, to those of its output.

    Args:
        student: The converted model.
        layer: The fitted layer.
        module: Its module.
        output: Its output, ``[G, S, O / G]``.
        target: Output of the convolution, ``[G, S, O / G]``.
    """
    flat, wanted = (values.permute(1, 0, 2).flatten(1) for values in (output, target))
    if isinstance(module, NormalizedAdderConv2d):
        own = module.normalization
        _set_running(own, flat)
        own.weight.copy_(wanted.std(0))
        own.bias.copy_(wanted.mean(0))  # includes the convolution's bias
        return
    if module.bias is not None:
        flat = flat + module.bias.detach().float()
    for path in layer.consumers:
        norm = student.get_submodule(path)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            _set_running(norm, flat)


def _set_running(norm: nn.modules.batchnorm._BatchNorm, values: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(values.mean(0))
    norm.running_var.copy_(values.var(0))
