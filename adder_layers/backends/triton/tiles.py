"""Choice of the tile for a layer by kernel, width of the layer, and device, from a static table.

Nothing is tuned at run time, so that two runs launch the same kernels and the first call costs one compilation.
"""

import functools
from typing import NamedTuple

from .tile_table import TABLE

KERNELS = ("forward", "input_grad")
# Below this many filters (or channels) in a group, most of a tile's columns would be padding.
TILED_WIDTH = 8
# Wider tiles read less, narrower ones waste less on tails.
WIDTHS = (64, 32, 16)
# How many more filters than the fewest possible, after padding, are worth a wider tile.
PADDING = 1.1
# The interpreter's cost depends on operations more than on elements, so its tiles are as large as the layer.
INTERPRETED_WARPS = 128


class Tile(NamedTuple):
    """Shape of a tiled kernel's tile, ``[outer, rows, lanes]``; ``forward_kernels.py`` describes its axes.

    Operands are loaded without shared memory only if ``outer * lanes`` is below ``32 * warps``.

    Args:
        lanes: Lanes of a warp along filters (or channels).
        warps: Warps of a program.
        pieces: Tiles of positions that a program computes.
        unroll: Terms per iteration of the loop.
        outer: Filters (or channels) in each thread's registers.
    """

    lanes: int
    warps: int
    pieces: int
    unroll: int
    outer: int = 16

    @property
    def width(self) -> int:
        """Number of filters (or channels) in a tile."""
        return self.outer * self.lanes

    @property
    def rows(self) -> int:
        """Number of positions in one piece."""
        return 32 // self.lanes * self.warps

    @property
    def positions(self) -> int:
        """Number of positions that a program computes."""
        return self.pieces * self.rows


class Block(NamedTuple):
    """Shape of a direct kernel's tile, ``positions x width``."""

    positions: int
    width: int
    warps: int = 4


# Lanes follow positions, or channels where those are neighbors in memory.
DIRECT_ROWS, DIRECT_CHANNELS = Block(256, 1), Block(16, 32)


class Device(NamedTuple):
    """Properties of a device on which the choice of a tile depends.

    Args:
        processors: Number of multiprocessors; 0 for Triton's interpreter.
        wave: Lanes of a warp.
        target: Name of the architecture, such as ``sm_90`` or ``gfx942``.
    """

    processors: int
    wave: int = 32
    target: str = "sm_90"


def width_class(width: int) -> int:
    """Return the tile's width for a layer whose groups have ``width`` filters or channels."""
    padded = {tile: -(-width // tile) * tile for tile in WIDTHS}
    return next(tile for tile in WIDTHS if padded[tile] <= PADDING * min(padded.values()))


def known_target(target: str) -> str:
    """Return the table's key for a device: its own, else the nearest lower capability, else the lowest."""
    if target in TABLE:
        return target
    known = sorted((name for name in TABLE if name.startswith("sm_")), key=_capability)
    if not target.startswith("sm_"):
        return "gfx942"
    return next((name for name in reversed(known) if _capability(name) <= _capability(target)), known[0])


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def tiles_of(target: str, kernel: str, width: int) -> tuple[Tile, Tile]:
    """Return the tiles of a width class: for layers that fill the device, and for those that do not."""
    large, small = TABLE[known_target(target)][kernel][width]
    return Tile(width // 16, *large), Tile(width // 16, *small)


@functools.cache
def choose_tile(kernel: str, width: int, positions: int, groups: int, device: Device) -> Tile:
    """Choose the tile for a layer.

    Args:
        kernel: ``"forward"`` or ``"input_grad"``.
        width: Filters (forward) or channels (input gradient) of a group.
        positions: Output positions (forward) or input positions of one phase, over all images.
        groups: Number of channel groups, times the phases of the stride for the input gradient.
        device: The device on which the kernel runs.
    """
    large, small = tiles_of(device.target, kernel, width_class(width))
    if device.processors == 0:
        while large.warps < INTERPRETED_WARPS and large.positions < positions:
            large = large._replace(warps=2 * large.warps)
        return large
    return large if fills(large, width, positions, groups, device) else small


def fills(tile: Tile, width: int, positions: int, groups: int, device: Device) -> bool:
    """Return whether a tile gives each multiprocessor two programs or more, for the arguments of ``choose_tile``."""
    programs = -(-positions // tile.positions) * -(-width // tile.width) * groups
    return programs >= 2 * device.processors


def configurations(target: str) -> list[tuple[str, Tile | Block]]:
    """Return every kernel with every tile that may be chosen on a device."""
    tiled = [
        (f"{kernel}_tiled", tile) for kernel in KERNELS for width in WIDTHS for tile in tiles_of(target, kernel, width)
    ]
    direct = [(f"{kernel}_direct", block) for kernel in KERNELS for block in (DIRECT_ROWS, DIRECT_CHANNELS)]
    return [*tiled, *direct]
