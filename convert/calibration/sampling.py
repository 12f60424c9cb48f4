"""Sample a layer's input windows and outputs at random positions.

A fit needs thousands of windows, but not all of them: a few positions in each of many images are more informative than
every position of a few images, and take little memory.
"""

from collections.abc import Mapping, Sequence
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
def layer_windows(model: nn.Module, path: str, batches: Sequence[Tensor], positions: Tensor) -> Tensor:
    """Sample windows of one layer's input, running the model only up to that layer.

    Args:
        model: The model to run.
        path: Path of the layer.
        batches: Images ``[n, C, H, W]``, N in all.
        positions: Flat output positions, ``[N, P]``.

    Returns:
        Windows ``[G, S, K]`` on the model's device, with S = N · P.
    """
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Conv2d)
    parts: list[Tensor] = []
    taken = 0

    def sample(_: str, inputs: tuple[Any, ...]) -> None:
        chosen = positions[taken : taken + len(inputs[0])]
        parts.append(windows_at(inputs[0], layer, chosen))
        raise _StopForward

    with hooked({path: layer}, pre=sample):
        for batch in batches:
            try:
                model(move_like(batch, model))
            except _StopForward:
                taken += len(batch)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def layer_outputs(model: nn.Module, positions: Mapping[str, Tensor], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sample the outputs of several layers in one pass over the batches.

    Args:
        model: The model to run.
        positions: Flat output positions of each layer by path, ``[N, P]``.
        batches: Images ``[n, C, H, W]``, N in all.

    Returns:
        Outputs ``[G, S, O / G]`` on the CPU by path, with S = N · P in the order of ``layer_windows``.
    """
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in positions}
    parts: dict[str, list[Tensor]] = {path: [] for path in positions}
    index = taken = 0

    def sample(path: str, _: tuple[Any, ...], output: Tensor) -> None:
        if len(parts[path]) > index:
            return  # a layer that is called again in the same pass: the first call counts, as in layer_windows
        chosen = positions[path][taken : taken + len(output)].to(output.device)
        values = output.flatten(2).gather(2, chosen[:, None].expand(-1, output.shape[1], -1))  # [n, O, P]
        grouped = values.unflatten(1, (layers[path].groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
        parts[path].append(grouped.cpu())

    with hooked(layers, post=sample):
        for index, batch in enumerate(batches):  # noqa: B007 - the hook reads it
            model(move_like(batch, model))
            taken += len(batch)
    return {path: torch.cat(values, dim=1) for path, values in parts.items()}
