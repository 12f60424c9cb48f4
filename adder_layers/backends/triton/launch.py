"""Launches the Triton kernels: packs weights, takes a tile from the table, and computes the grid.

The same contract as ``blocked.py`` and ``cpu.py``. Triton is imported at the first call, so that the package works
where it is not installed.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Window
from .tiles import DIRECT_CHANNELS, DIRECT_ROWS, TILED_WIDTH, Device, Tile, choose_tile

# Positions are counted in 32 bits, elements in 64: larger batches go through in parts.
POSITION_LIMIT = 1 << 30


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class Launch(NamedTuple):
    """One call of a kernel: its name, number of programs, arguments, and Triton's options with the constants."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int | bool]


def kernel(name: str) -> Any:
    """The Triton function of that name."""
    from ...integer import triton_kernels as gpu_kernels
    from . import forward_kernels as conv_kernels
    from . import input_grad_kernels as conv_grad_kernels

    modules = {"forward": conv_kernels, "input_grad": conv_grad_kernels, "integer": gpu_kernels}
    return getattr(modules[name.rpartition("_")[0]], name)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as it does where ``TRITON_INTERPRET`` is set."""
    return type(kernel("forward_tiled")).__name__ != "JITFunction"


@functools.cache
def device(index: int | None) -> Device:
    """What the choice of a tile depends on, of a CUDA device."""
    if interpreted():
        return Device(0)
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32), name)


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Write ``-Σ|x - w|`` to ``output``; see ``blocked.forward``. Sums are fp32, whatever the dtype of the operands."""
    rows, columns = output.shape[2:]
    for images in parts(input.shape[0], rows * columns):
        with torch.cuda.device_of(input):
            where = device(input.device.index)
            run(plan_forward(input[images], weight, output[images], window, groups, where))


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Write ``Σ_o grad[o] · HardTanh(w - x)`` to the fp32 ``result``; see ``blocked.input_grad``.

    NaN in ``input`` or ``grad`` comes through. NaN in ``weight`` counts as a slope of -1: saturation turns it into 0.
    Its outputs are NaN all the same, and with them any gradient that depends on their values.
    """
    for images in parts(input.shape[0], input.shape[2] * input.shape[3]):
        with torch.cuda.device_of(input):
            where = device(input.device.index)
            run(plan_input_grad(grad[images], input[images], weight, result[images], window, groups, where))


def parts(batch: int, pixels: int) -> list[slice]:
    """Images that may go through a kernel together, each with ``pixels`` positions."""
    images = max(1, POSITION_LIMIT // max(pixels, 1))
    return [slice(first, first + images) for first in range(0, batch, images)]


def run(launch: Launch) -> None:
    """Run a kernel, unless there is nothing to compute."""
    if min(launch.grid):
        kernel(launch.kernel)[launch.grid](*launch.arguments, **launch.options)


def plan_forward(
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    window: Window,
    groups: int,
    where: Device,
    tile: Tile | None = None,
) -> Launch:
    """The launch that ``forward`` makes, or would with another tile; weights are packed, nothing else is computed."""
    batch, all_filters, rows, columns = output.shape
    channels, filters = weight.shape[1], all_filters // groups
    positions = batch * rows * columns
    geometry = (*input.shape[2:], rows, columns, positions, *_steps(weight, window))
    x_n, x_c, x_h, x_w = input.stride()
    if filters < TILED_WIDTH:
        tiles, grid, options = _direct(output, positions, where)
        sizes = (channels, filters, all_filters, tiles)
        strides = (x_n, x_c, x_h, x_w, *output.stride())
        arguments = (input, weight.contiguous(), output, *sizes, *geometry, *strides)
        return Launch("forward_direct", (grid,), arguments, options)
    tile = tile or choose_tile("forward", filters, positions, groups, where)
    packed, tiles, grid, options = _tiled(tile, weight, (0, 3, 2, 1), positions, groups, where)
    arguments = (input, packed, output, channels, filters, tiles, groups, *geometry, x_n, x_h, x_w, *output.stride())
    return Launch("forward_tiled", (grid,), arguments, {"X_C": x_c, **options})


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
    """The launch that ``input_grad`` makes, or would with another tile; see ``plan_forward``."""
    batch, all_channels, height, width = input.shape
    channels, filters = weight.shape[1], weight.shape[0] // groups
    phases = window.stride[0] * window.stride[1]
    # Rows and columns of the largest phase; the kernel skips what a smaller one lacks.
    rows, columns = -(-height // window.stride[0]), -(-width // window.stride[1])
    positions = batch * rows * columns
    geometry = (height, width, *grad.shape[2:], rows, columns, positions, *_steps(weight, window))
    g_n, g_o, g_h, g_w = grad.stride()
    if channels < TILED_WIDTH:
        tiles, grid, options = _direct(result, positions, where)
        sizes = (channels, all_channels, tiles, filters)
        strides = (*input.stride(), g_n, g_o, g_h, g_w, *result.stride())
        arguments = (grad, input, weight.contiguous(), result, *sizes, *geometry, *strides)
        return Launch("input_grad_direct", (grid, phases), arguments, options)
    tile = tile or choose_tile("input_grad", channels, positions, groups * phases, where)
    packed, tiles, grid, options = _tiled(tile, weight, (0, 3, 1, 2), positions, groups, where)
    packed.add_(1).mul_(0.5)
    strides = (*input.stride(), g_n, g_h, g_w, *result.stride())
    arguments = (grad, input, packed, result, channels, tiles, filters, groups, *geometry, *strides)
    return Launch("input_grad_tiled", (grid, phases), arguments, {"G_O": g_o, **options})


def _steps(weight: Tensor, window: Window) -> tuple[int, ...]:
    return weight.shape[3], weight.shape[2] * weight.shape[3], *window.stride, *window.padding, *window.dilation


def _direct(written: Tensor, positions: int, where: Device) -> tuple[int, int, dict[str, int | bool]]:
    """Tiles along channels, programs, and options; lanes go along what are neighbors in the written tensor."""
    channels = written.shape[1]
    block = DIRECT_CHANNELS if written.stride(1) == 1 and channels > 1 else DIRECT_ROWS
    tiles = -(-channels // block.width)
    options = {"POSITIONS": block.positions, "WIDTH": block.width, **launch_options(block.warps, where)}
    return tiles, -(-positions // block.positions) * tiles, options


def _tiled(
    tile: Tile, weight: Tensor, order: tuple[int, int, int, int], positions: int, groups: int, where: Device
) -> tuple[Tensor, int, int, dict[str, int | bool]]:
    """Packed weights, tiles along filters (or channels), programs, and options."""
    packed = _packed(weight, groups, tile.width, order)
    tiles = packed.shape[3] // tile.width
    options = {
        "OUTER": tile.outer,
        "ROWS": tile.rows,
        "LANES": tile.lanes,
        "PIECES": tile.pieces,
        "UNROLL": tile.unroll,
        **launch_options(tile.warps, where),
    }
    return packed, tiles, -(-positions // tile.positions) * tiles * groups, options


def launch_options(warps: int, where: Device) -> dict[str, int | bool]:
    """A wave of 64 lanes does the work of two warps."""
    return {"num_warps": max(1, warps * 32 // where.wave), "enable_fp_fusion": True}


def _packed(weight: Tensor, groups: int, width: int, order: tuple[int, int, int, int]) -> Tensor:
    """``[O, C / G, kh, kw]`` as fp32, as ``[G, O / G, C / G, taps]`` in ``order``, the last axis in whole tiles."""
    filters, channels, *_ = weight.shape
    grouped = weight.reshape(groups, filters // groups, channels, -1).permute(order)
    *leading, last = grouped.shape
    padded = -(-last // width) * width
    packed = torch.empty(*leading, padded, dtype=torch.float32, device=weight.device)
    packed[..., :last].copy_(grouped)
    if padded > last:
        packed[..., last:].zero_()  # what is computed from it is not stored; never leave it to chance
    return packed
