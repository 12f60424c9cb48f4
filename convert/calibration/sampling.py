"""Sample a layer's input windows and outputs at random positions.

A fit needs thousands of windows, but not all of them: a few positions in each of many images are more informative than
every position of a few images, and take little memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adder_layers.modules import AdderConv2dSame, same_padding
from ..conversion.converters import converter_of
from ..graph.hooks import hooked
from ..graph.modes import move_like


class _StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Signal that ends a forward pass once the layer of interest has been reached."""


def draw_positions(output_shape: Sequence[int], images: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw random output positions for each image, with replacement.

    Args:
        output_shape: Output shape of the layer, ``[N, O, H', W']``.
        images: Number of images.
        count: Number of positions per image.
        generator: Random generator on the CPU.

    Returns:
        Flat indices into ``H' · W'``, ``[images, count]``.
    """
    return torch.randint(output_shape[-2] * output_shape[-1], (images, count), generator=generator)


def windows_at(input: Tensor, layer: nn.Conv2d, positions: Tensor) -> Tensor:
    """Gather the input windows, including padding, that a layer computes some of its outputs from.

    Args:
        input: Input of the layer, ``[N, C, H, W]``.
        layer: A convolution or adder layer with numeric or named padding.
        positions: Flat output positions, ``[N, P]``.

    Returns:
        Windows ``[G, N · P, C / G · kh · kw]``, channel-major like ``weight.reshape(O, -1)``.
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    converter = converter_of(type(layer))
    dynamic = isinstance(layer, AdderConv2dSame) or (converter is not None and converter.same_padding(layer))
    sides = same_padding(input.shape[-2:], layer) if dynamic else layer._reversed_padding_repeated_twice
    padded = F.pad(input, sides, mode=mode)
    (height, width), (down, right) = layer.kernel_size, layer.dilation
    out_width = (padded.shape[3] - right * (width - 1) - 1) // layer.stride[1] + 1
    positions = positions.to(input.device)
    rows = (positions // out_width * layer.stride[0])[..., None, None] + torch.arange(height, device=input.device)[
        :, None
    ] * down
    columns = (positions % out_width * layer.stride[1])[..., None, None] + torch.arange(
        width, device=input.device
    ) * right
    image = torch.arange(len(input), device=input.device)[:, None, None, None]
    windows = padded[image, :, rows, columns]  # [N, P, kh, kw, C]
    count = windows.shape[0] * windows.shape[1]
    return (
        windows.permute(4, 0, 1, 2, 3).reshape(layer.groups, -1, count, height * width).permute(0, 2, 1, 3).flatten(2)
    )


@torch.no_grad()
def layer_inputs(model: nn.Module, path: str, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Run the model on each batch, only up to one layer, and yield the layer's input.

    Args:
        model: The model to run.
        path: Path of the layer; its first call counts.
        batches: Images ``[n, C, H, W]``.

    Yields:
        The input of each batch, ``[n, C, H, W]``.
    """

    def stop(_: str, inputs: tuple[Any, ...]) -> None:
        raise _StopForward(inputs[0])

    for batch in batches:
        with hooked({path: model.get_submodule(path)}, pre=stop):
            try:
                model(move_like(batch, model))
            except _StopForward as reached:
                input: Tensor = reached.args[0]
        yield input


@torch.no_grad()
def sample_windows(layer: nn.Conv2d, inputs: Iterable[Tensor], positions: Tensor) -> Tensor:
    """Sample windows of a layer's input, batch by batch.

    Args:
        layer: The layer.
        inputs: Its input in each batch, ``[n, C, H, W]``, for N images in all.
        positions: Flat output positions, ``[N, P]``.

    Returns:
        Windows ``[G, S, K]`` on the inputs' device, with S = N · P.
    """
    parts, taken = [], 0
    for input in inputs:
        parts.append(windows_at(input, layer, positions[taken : taken + len(input)]))
        taken += len(input)
    return torch.cat(parts, dim=1)


def outputs_at(output: Tensor, layer: nn.Conv2d, positions: Tensor) -> Tensor:
    """Gather some outputs of a layer.

    Args:
        output: Output of the layer, ``[N, O, H', W']``.
        layer: The layer.
        positions: Flat output positions, ``[N, P]``.

    Returns:
        Outputs ``[G, N · P, O / G]``, in the order of ``windows_at``.
    """
    chosen = positions.to(output.device)[:, None].expand(-1, output.shape[1], -1)
    values = output.flatten(2).gather(2, chosen)  # [N, O, P]
    grouped: Tensor = values.unflatten(1, (layer.groups, -1))  # [N, G, O / G, P]
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def sample_outputs(layer: nn.Conv2d, outputs: Iterable[Tensor], positions: Tensor) -> Tensor:
    """Sample a layer's outputs, batch by batch.

    Args:
        layer: The layer.
        outputs: Its output in each batch, ``[n, O, H', W']``, for N images in all.
        positions: Flat output positions, ``[N, P]``.

    Returns:
        Outputs ``[G, S, O / G]`` on their device, with S = N · P in the order of ``sample_windows``.
    """
    parts, taken = [], 0
    for output in outputs:
        parts.append(outputs_at(output, layer, positions[taken : taken + len(output)]))
        taken += len(output)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def layer_outputs(model: nn.Module, positions: Mapping[str, Tensor], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sample the outputs of several layers in one pass over the batches.

    Args:
        model: The model to run.
        positions: Flat output positions of each layer by path, ``[N, P]``.
        batches: Images ``[n, C, H, W]``, N in all.

    Returns:
        Outputs ``[G, S, O / G]`` on the CPU by path, with S = N · P in the order of ``sample_windows``.
    """
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in positions}
    parts: dict[str, list[Tensor]] = {path: [] for path in positions}
    index = taken = 0

    def sample(path: str, _: tuple[Any, ...], output: Tensor) -> None:
        if len(parts[path]) > index:
            return  # a layer that is called again in the same pass: the first call counts, as in layer_inputs
        chosen = positions[path][taken : taken + len(output)]
        parts[path].append(outputs_at(output, layers[path], chosen).cpu())

    with hooked(layers, post=sample):
        for index, batch in enumerate(batches):  # noqa: B007 - the hook reads it
            model(move_like(batch, model))
            taken += len(batch)
    return {path: torch.cat(values, dim=1) for path, values in parts.items()}
