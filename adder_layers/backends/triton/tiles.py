"""Which tile a layer gets: by kernel, width of the layer, and device, from a table in Python.

Nothing is tuned at run time, so that two runs take the same path and a first call costs one compilation.
"""

import functools
from typing import NamedTuple

from .tile_table import TABLE

KERNELS = ("forward", "input_grad")
# Below this many filters (or channels) in a group, most of a tile's columns would be padding.
TILED_WIDTH = 8
# A wider tile reads less; a narrower one wastes less on tails.
WIDTHS = (64, 32, 16)
# The share of padded filters, beyond the least possible, that is worth a wider tile.
PADDING = 1.1
# The interpreter's cost is per operation more than per element, so its tiles are as large as the layer.
INTERPRETED_WARPS = 128


class Tile(NamedTuple):
    """Shape of a tiled kernel's tile; ``forward_kernels.py`` says what its axes are.

    For operands to be loaded without shared memory, ``outer * lanes`` has to be below ``32 * warps``.
    """

    lanes: int
    warps: int
    pieces: int
    unroll: int
    outer: int = 16

    @property
    def width(self) -> int:
        """Filters (or channels) of a tile."""
        return self.outer * self.lanes

    @property
    def rows(self) -> int:
        """Positions of one piece."""
        return 32 // self.lanes * self.warps

    @property
    def positions(self) -> int:
        """Positions of a program."""
        return self.pieces * self.rows


class Block(NamedTuple):
    """Shape of a direct kernel's tile, ``positions x width``."""

    positions: int
    width: int
    warps: int = 4


# Positions, or channels where those are neighbors in memory, go along lanes.
DIRECT_ROWS, DIRECT_CHANNELS = Block(256, 1), Block(16, 32)


class Device(NamedTuple):
    """What the choice of a tile depends on; no multiprocessors means Triton's interpreter."""

    processors: int
    wave: int = 32
    target: str = "sm_90"


def width_class(width: int) -> int:
    """The tile's width for a layer whose groups have ``width`` filters or channels."""
    padded = {tile: -(-width // tile) * tile for tile in WIDTHS}
    return next(tile for tile in WIDTHS if padded[tile] <= PADDING * min(padded.values()))


def known_target(target: str) -> str:
    """The table's entry for a device: its own, else the nearest lower capability, else the lowest there is."""
    if target in TABLE:
        return target
    known = sorted((name for name in TABLE if name.startswith("sm_")), key=_capability)
    if not target.startswith("sm_"):
        return "gfx942"
    return next((name for name in reversed(known) if _capability(name) <= _capability(target)), known[0])


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def tiles_of(target: str, kernel: str, width: int) -> tuple[Tile, Tile]:
    """The tiles of a width class: for layers that fill the device, and for those that do not."""
    large, small = TABLE[known_target(target)][kernel][width]
    return Tile(width // 16, *large), Tile(width // 16, *small)


@functools.cache
def choose_tile(kernel: str, width: int, positions: int, groups: int, device: Device) -> Tile:
    """The tile for a layer.

    Args:
        kernel: ``"forward"`` or ``"input_grad"``.
        width: Filters (forward) or channels (input gradient) of a group.
        positions: Output positions (forward) or input positions of one phase, over all images.
        groups: Number of channel groups, times the phases of the stride for the input gradient.
        device: Where it runs.
    """
    large, small = tiles_of(device.target, kernel, width_class(width))
    if device.processors == 0:
        while large.warps < INTERPRETED_WARPS and large.positions < positions:
            large = large._replace(warps=2 * large.warps)
        return large
    return large if fills(large, width, positions, groups, device) else small


def fills(tile: Tile, width: int, positions: int, groups: int, device: Device) -> bool:
    """Whether a tile makes two programs or more for each multiprocessor; other arguments as of ``choose_tile``."""
    programs = -(-positions // tile.positions) * -(-width // tile.width) * groups
    return programs >= 2 * device.processors


def configurations(target: str) -> list[tuple[str, Tile | Block]]:
    """Every kernel with every tile that a device may get."""
    tiled = [
        (f"{kernel}_tiled", tile) for kernel in KERNELS for width in WIDTHS for tile in tiles_of(target, kernel, width)
    ]
    direct = [(f"{kernel}_direct", block) for kernel in KERNELS for block in (DIRECT_ROWS, DIRECT_CHANNELS)]
    return [*tiled, *direct]
