"""The Triton backend: packs weights, chooses a tile from the table, computes the grid, and launches the kernels.

Triton is imported at the first launch, so that the package works where it is not installed.
"""

import functools
import importlib.util
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Window
from .tiles import DIRECT_CHANNELS, DIRECT_ROWS, TILED_WIDTH, Device, Tile, choose_tile

# Positions are counted in 32 bits, elements in 64: larger batches go through in parts.
POSITION_LIMIT = 1 << 30
# The modules of the kernels, imported when one of them is launched.
FORWARD, INPUT_GRAD = f"{__package__}.forward_kernels", f"{__package__}.input_grad_kernels"


@functools.cache
def available() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class Geometry(NamedTuple):
    """Sizes, positions and window of a convolution, as its kernels take them.

    Args:
        height: Rows of the input.
        width: Columns of the input.
        out_h: Rows of the output.
        out_w: Columns of the output.
        rows: Positions of an image along its height: outputs, or inputs of one phase for the input gradient.
        columns: Positions of an image along its width.
        positions: Positions of all images.
        kernel_w: Taps in a row of the kernel.
        taps: Taps of the kernel.
        stride_h: Stride of the window; the fields that follow are its other settings, in pixels.
    """

    height: int
    width: int
    out_h: int
    out_w: int
    rows: int
    columns: int
    positions: int
    kernel_w: int
    taps: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int


class Strides(NamedTuple):
    """Strides of a ``[N, C, H, W]`` tensor in elements."""

    n: int
    c: int
    h: int
    w: int


class Launch(NamedTuple):
    """One call of a kernel.

    Args:
        module: Full name of the module that defines the kernel; importing it imports Triton.
        kernel: Name of the kernel.
        grid: Number of programs along each axis.
        arguments: Positional arguments.
        options: Constants of the kernel, and Triton's own options.
    """

    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int | bool]

    def function(self) -> Any:
        """Return the Triton function."""
        return getattr(import_module(self.module), self.kernel)

    def run(self) -> None:
        """Run the kernel, unless there is nothing to compute."""
        if min(self.grid):
            self.function()[self.grid](*self.arguments, **self.options)


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, as it does where ``TRITON_INTERPRET`` is set."""
    return type(import_module(FORWARD).forward_tiled).__name__ != "JITFunction"


@functools.cache
def device(index: int | None) -> Device:
    """Return the properties of a CUDA device on which the choice of a tile depends."""
    if interpreted():
        return Device(0)
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32), name)


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``output`` with ``-Σ_j 2^-j Σ|x - w[j]|``; ``Backend.forward`` describes the arguments."""
    rows, columns = output.shape[2:]
    for images in parts(input.shape[0], rows * columns):
        with torch.cuda.device_of(input):
            where = device(input.device.index)
            plan_forward(input[images], weight, output[images], window, groups, where).run()


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``result`` with the input's gradient; ``Backend.input_grad`` describes formula and arguments.

    NaN in ``input`` or ``grad`` propagates. NaN in ``weight`` counts as a slope of -1, because saturation turns it into
    0; its outputs are NaN all the same, and with them any gradient that depends on their values.
    """
    for images in parts(input.shape[0], input.shape[2] * input.shape[3]):
        with torch.cuda.device_of(input):
            where = device(input.device.index)
            plan_input_grad(grad[images], input[images], weight, result[images], window, groups, where).run()


def parts(batch: int, pixels: int) -> list[slice]:
    """Split a batch into slices of images, each with ``pixels`` positions, that one launch can process."""
    images = max(1, POSITION_LIMIT // max(pixels, 1))
    return [slice(first, first + images) for first in range(0, batch, images)]


def plan_forward(
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    window: Window,
    groups: int,
    where: Device,
    tile: Tile | None = None,
) -> Launch:
    """Return the launch that ``forward`` makes, or would make with another tile; weights are packed already."""
    batch, all_filters, rows, columns = output.shape
    channels, filters = weight.shape[2], all_filters // groups
    positions = batch * rows * columns
    geometry = geometry_of((*input.shape[2:], rows, columns), (rows, columns), positions, window)
    strides = (Strides(*input.stride()), Strides(*output.stride()))
    if filters < TILED_WIDTH:
        tiles, grid, options = _direct(output, positions, where)
        arguments = (input, _last_to_first(weight), output, channels, filters, all_filters, tiles, geometry, *strides)
        return Launch(FORWARD, "forward_direct", (grid,), arguments, {"TERMS": len(weight), **options})
    tile = tile or choose_tile("forward", filters, positions, groups, where)
    packed, tiles, grid, options = _tiled(tile, weight, (1, 0, 4, 3, 2), positions, groups, where)
    arguments = (input, packed, output, channels, filters, tiles, groups, geometry, *strides)
    return Launch(FORWARD, "forward_tiled", (grid,), arguments, {"X_C": input.stride(1), **options})


def plan_input_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    result: Tensor,
    window: Window,
    groups: int,
    where: Device,
    tile: Tile | None = None,
) -> Launch:
    """Return the launch that ``input_grad`` makes, or would make with another tile; weights are packed already."""
    batch, all_channels, height, width = input.shape
    channels, filters = weight.shape[2], weight.shape[1] // groups
    phases = window.stride[0] * window.stride[1]
    # Rows and columns of the largest phase; the kernel skips pixels that a smaller one lacks.
    rows, columns = -(-height // window.stride[0]), -(-width // window.stride[1])
    positions = batch * rows * columns
    geometry = geometry_of((height, width, *grad.shape[2:]), (rows, columns), positions, window)
    strides = (Strides(*input.stride()), Strides(*grad.stride()), Strides(*result.stride()))
    if channels < TILED_WIDTH:
        tiles, grid, options = _direct(result, positions, where)
        sizes = (channels, all_channels, tiles, filters)
        arguments = (grad, input, _last_to_first(weight), result, *sizes, geometry, *strides)
        return Launch(INPUT_GRAD, "input_grad_direct", (grid, phases), arguments, {"TERMS": len(weight), **options})
    tile = tile or choose_tile("input_grad", channels, positions, groups * phases, where)
    packed, tiles, grid, options = _tiled(tile, weight, (1, 0, 4, 2, 3), positions, groups, where)
    packed.add_(1).mul_(0.5)
    arguments = (grad, input, packed, result, channels, tiles, filters, groups, geometry, *strides)
    return Launch(INPUT_GRAD, "input_grad_tiled", (grid, phases), arguments, {"G_O": grad.stride(1), **options})


def geometry_of(sizes: Sequence[int], positions: tuple[int, int], all_positions: int, window: Window) -> Geometry:
    """Return the geometry that kernels take.

    Args:
        sizes: Height and width of the input, height and width of the output.
        positions: Positions of an image along both axes.
        all_positions: Positions of all images.
        window: The sliding window.
    """
    height, width, out_h, out_w = sizes
    kernel_h, kernel_w = window.kernel
    settings = (*window.stride, *window.padding, *window.dilation)
    return Geometry(height, width, out_h, out_w, *positions, all_positions, kernel_w, kernel_h * kernel_w, *settings)


def _direct(written: Tensor, positions: int, where: Device) -> tuple[int, int, dict[str, int | bool]]:
    """Return tiles along channels, programs, and options; lanes follow neighbors in the written tensor."""
    channels = written.shape[1]
    block = DIRECT_CHANNELS if written.stride(1) == 1 and channels > 1 else DIRECT_ROWS
    tiles = -(-channels // block.width)
    options = {"POSITIONS": block.positions, "WIDTH": block.width, **launch_options(block.warps, where)}
    return tiles, -(-positions // block.positions) * tiles, options


def _tiled(
    tile: Tile, weight: Tensor, order: tuple[int, ...], positions: int, groups: int, where: Device
) -> tuple[Tensor, int, int, dict[str, int | bool]]:
    """Return packed weights, tiles along filters (or channels), programs, and options."""
    packed = _packed(weight, groups, tile.width, order)
    tiles = packed.shape[-1] // tile.width
    options = {
        "TERMS": len(weight),
        "OUTER": tile.outer,
        "ROWS": tile.rows,
        "LANES": tile.lanes,
        "PIECES": tile.pieces,
        "UNROLL": tile.unroll,
        **launch_options(tile.warps, where),
    }
    return packed, tiles, -(-positions // tile.positions) * tiles * groups, options


def launch_options(warps: int, where: Device) -> dict[str, int | bool]:
    """Return Triton's options for a number of warps; a wave of 64 lanes does the work of two of them."""
    return {"num_warps": max(1, warps * 32 // where.wave), "enable_fp_fusion": True}


def _last_to_first(weight: Tensor) -> Tensor:
    """Return a weight ``[T, O, C / G, kh, kw]`` with its terms in reverse order, contiguous."""
    return weight.flip(0).contiguous() if len(weight) > 1 else weight.contiguous()


def _packed(weight: Tensor, groups: int, width: int, order: tuple[int, ...]) -> Tensor:
    """Permute ``[T, G, O / G, C / G, taps]`` of a weight ``[T, O, C / G, kh, kw]``, terms from last to first.

    The result is fp32, its last axis in whole tiles.
    """
    terms, filters, channels, *_ = weight.shape
    grouped = _last_to_first(weight).reshape(terms, groups, filters // groups, channels, -1).permute(order)
    *leading, last = grouped.shape
    padded = -(-last // width) * width
    packed = torch.empty(*leading, padded, dtype=torch.float32, device=weight.device)
    packed[..., :last].copy_(grouped)
    if padded > last:
        packed[..., last:].zero_()  # results of it are not stored, but never read uninitialized memory
    return packed
