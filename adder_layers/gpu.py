"""Launches the Triton kernels: packs weights, chooses a tile from a table, and computes the grid.

The same contract as ``blocked.py`` and ``cpu.py``. Triton is imported at the first call, so that the package works
where it is not installed; nothing is tuned at run time, so that two runs take the same path.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .geometry import Window

# Positions are counted in 32 bits, elements in 64: larger batches go through in parts.
POSITION_LIMIT = 1 << 30
# Below this many filters (or channels) in a group, most of a tile's columns would be padding.
TILED_WIDTH = 8


class Tile(NamedTuple):
    """Shape of a tiled kernel's tile; ``conv_kernels.py`` says what its axes are.

    A thread's registers hold ``outer`` filters. A warp is ``row_lanes * column_lanes``. For a piece of operands to be
    loaded without shared memory, ``outer * column_lanes`` has to be below ``32 * warps``.
    """

    column_lanes: int
    warps: int
    unroll: int
    outer: int = 16

    @property
    def row_lanes(self) -> int:
        """Lanes of a warp along positions."""
        return 32 // self.column_lanes

    @property
    def width(self) -> int:
        """Filters (or channels) of a tile."""
        return self.outer * self.column_lanes

    @property
    def piece(self) -> int:
        """Positions of one piece; a program makes several."""
        return self.warps * self.row_lanes


class Block(NamedTuple):
    """Shape of a direct kernel's tile, ``positions x width``."""

    positions: int
    width: int
    warps: int = 4


# Pieces of positions in a program: what leaves registers enough for the loop without a spill.
PIECES = {"forward": 4, "input_grad": 3}
# Iterations of the loop over terms that are written out: fewer spend issue slots on addresses, more spill.
UNROLL = {"forward": 4, "input_grad": 4}
# Lanes along filters: 64, 32 or 16 filters a tile. A wider tile reads less; a narrower one wastes less on tails.
COLUMN_LANES = (4, 2, 1)
# Positions, or channels where those are neighbours in memory, go along lanes.
DIRECT_ROWS, DIRECT_CHANNELS = Block(256, 1), Block(16, 32)
# The interpreter's cost is per operation more than per element, so its tiles are as large as the layer.
INTERPRETED_WARPS = 128


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class Device(NamedTuple):
    """What the choice of a tile depends on; no multiprocessors means Triton's interpreter."""

    processors: int
    wave: int = 32


class Launch(NamedTuple):
    """One call of a kernel: its name, number of programs, arguments, and Triton's options with the constants."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, int | bool]


def kernel(name: str) -> Any:
    """The Triton function of that name."""
    from . import conv_grad_kernels, conv_kernels

    return getattr(conv_grad_kernels if name.startswith("input_grad") else conv_kernels, name)


@functools.cache
def _device(index: int | None) -> Device:
    if type(kernel("forward_tiled")).__name__ != "JITFunction":
        return Device(0)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.multi_processor_count, getattr(properties, "warp_size", 32))


def choose_tile(kernel: str, width: int, positions: int, groups: int, device: Device) -> Tile:
    """The tile for a layer.

    Args:
        kernel: ``"forward"`` or ``"input_grad"``.
        width: Filters (forward) or channels (input gradient) of a group.
        positions: Output positions (forward) or input positions of one phase, over all images.
        groups: Number of channel groups, times the phases of the stride for the input gradient.
        device: Where it runs.
    """
    padded = {lanes: -(-width // (16 * lanes)) * 16 * lanes for lanes in COLUMN_LANES}
    lanes = next(lanes for lanes in COLUMN_LANES if padded[lanes] <= 1.1 * min(padded.values()))
    if device.processors == 0:
        tile = Tile(lanes, 1, UNROLL[kernel])
        while tile.warps < INTERPRETED_WARPS and PIECES[kernel] * tile.piece < positions:
            tile = tile._replace(warps=2 * tile.warps)
        return tile
    tile = Tile(lanes, 4, UNROLL[kernel])
    programs = -(-positions // (PIECES[kernel] * tile.piece)) * (padded[lanes] // tile.width) * groups
    # Half the warps make twice the programs; with four lanes along filters their operands would no longer fit.
    return tile._replace(warps=2) if programs < 2 * device.processors and lanes < 4 else tile


def configurations() -> list[tuple[str, Tile | Block]]:
    """Every kernel with every tile that a device may get."""
    tiles = [(lanes, warps) for lanes in COLUMN_LANES for warps in (4, 2) if (lanes, warps) != (4, 2)]
    tiled = [(f"{name}_tiled", Tile(*tile, unroll)) for name, unroll in UNROLL.items() for tile in tiles]
    return [*tiled, *((f"{name}_direct", block) for name in UNROLL for block in (DIRECT_ROWS, DIRECT_CHANNELS))]


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Write ``-Σ|x - w|`` to ``output``; see ``blocked.forward``. Sums are fp32, whatever the dtype of the operands."""
    rows, columns = output.shape[2:]
    for images in _parts(input.shape[0], rows * columns):
        with torch.cuda.device_of(input):
            device = _device(input.device.index)
            _run(plan_forward(input[images], weight, output[images], window, groups, device))


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Write ``Σ_o grad[o] · HardTanh(w - x)`` to the fp32 ``result``; see ``blocked.input_grad``."""
    for images in _parts(input.shape[0], input.shape[2] * input.shape[3]):
        with torch.cuda.device_of(input):
            device = _device(input.device.index)
            _run(plan_input_grad(grad[images], input[images], weight, result[images], window, groups, device))


def _parts(batch: int, pixels: int) -> list[slice]:
    images = max(1, POSITION_LIMIT // max(pixels, 1))
    return [slice(first, first + images) for first in range(0, batch, images)]


def _run(launch: Launch) -> None:
    if min(launch.grid):
        kernel(launch.kernel)[launch.grid](*launch.arguments, **launch.options)


def plan_forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int, device: Device) -> Launch:
    """The launch that ``forward`` makes; weights are packed, nothing else is computed."""
    _, channels, _, kernel_w = weight.shape  # of a group, as are these filters
    batch, all_filters, rows, columns = output.shape
    filters = all_filters // groups
    positions = batch * rows * columns
    spatial = (*input.shape[2:], rows, columns, positions, kernel_w, weight[0, 0].numel())
    steps = (*window.stride, *window.padding, *window.dilation)
    x_n, x_c, x_h, x_w = input.stride()
    if filters < TILED_WIDTH:
        block = _block(output)
        tiles = -(-all_filters // block.width)
        return Launch(
            "forward_direct",
            (-(-positions // block.positions) * tiles,),
            (
                *(input, weight.contiguous(), output, channels, filters, all_filters, tiles, *spatial, *steps),
                *(x_n, x_c, x_h, x_w, *output.stride()),
            ),
            {"POSITIONS": block.positions, "FILTERS": block.width, **_options(block.warps, device)},
        )
    tile = choose_tile("forward", filters, positions, groups, device)
    packed = _packed(weight, groups, tile.width, (0, 3, 2, 1))
    tiles = packed.shape[3] // tile.width
    return Launch(
        "forward_tiled",
        (-(-positions // (PIECES["forward"] * tile.piece)) * tiles * groups,),
        (
            *(input, packed, output, channels, filters, tiles, groups, *spatial, *steps),
            *(x_n, x_h, x_w, *output.stride()),
        ),
        {"X_C": x_c, **_shape(tile, device)},
    )


def plan_input_grad(
    grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int, device: Device
) -> Launch:
    """The launch that ``input_grad`` makes; weights are packed, nothing else is computed."""
    _, channels, _, kernel_w = weight.shape  # of a group, as are these filters
    filters = weight.shape[0] // groups
    batch, all_channels, height, width = input.shape
    phases = window.stride[0] * window.stride[1]
    # Rows and columns of the largest phase; the kernel skips what a smaller one lacks.
    rows, columns = -(-height // window.stride[0]), -(-width // window.stride[1])
    positions = batch * rows * columns
    spatial = (height, width, *grad.shape[2:], rows, columns, positions, kernel_w, weight[0, 0].numel())
    steps = (*window.stride, *window.padding, *window.dilation)
    g_n, g_o, g_h, g_w = grad.stride()
    if channels < TILED_WIDTH:
        block = _block(result)
        tiles = -(-all_channels // block.width)
        return Launch(
            "input_grad_direct",
            (-(-positions // block.positions) * tiles, phases),
            (
                *(grad, input, weight.contiguous(), result, channels, all_channels, tiles, filters, *spatial, *steps),
                *(*input.stride(), g_n, g_o, g_h, g_w, *result.stride()),
            ),
            {"POSITIONS": block.positions, "CHANNELS": block.width, **_options(block.warps, device)},
        )
    tile = choose_tile("input_grad", channels, positions, groups * phases, device)
    packed = _packed(weight, groups, tile.width, (0, 3, 1, 2)).add_(1).mul_(0.5)
    tiles = packed.shape[3] // tile.width
    return Launch(
        "input_grad_tiled",
        (-(-positions // (PIECES["input_grad"] * tile.piece)) * tiles * groups, phases),
        (
            *(grad, input, packed, result, channels, tiles, filters, groups, *spatial, *steps),
            *(*input.stride(), g_n, g_h, g_w, *result.stride()),
        ),
        {"G_O": g_o, **_shape(tile, device)},
    )


def _block(written: Tensor) -> Block:
    """Lanes go along what are neighbours in the tensor that is written."""
    return DIRECT_CHANNELS if written.stride(1) == 1 and written.shape[1] > 1 else DIRECT_ROWS


def _shape(tile: Tile, device: Device) -> dict[str, int | bool]:
    return {
        "OUTER": tile.outer,
        "WARPS": tile.warps,
        "ROW_LANES": tile.row_lanes,
        "COLUMN_LANES": tile.column_lanes,
        "UNROLL": tile.unroll,
        **_options(tile.warps, device),
    }


def _options(warps: int, device: Device) -> dict[str, int | bool]:
    """A wave of 64 lanes does the work of two warps."""
    return {"num_warps": max(1, warps * 32 // device.wave), "enable_fp_fusion": True}


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
