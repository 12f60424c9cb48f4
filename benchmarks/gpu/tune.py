"""Time every candidate tile on this machine's GPU and write the best to ``backends/triton/tile_table.py``.

    python -m benchmarks.gpu.tune --models resnet18 resnet50 cifar_resnet20

For each kernel and width of tile, the table gets the tile that is fastest for the layers that fill the device, and the
one that is fastest for those that do not. A layer counts by the ratio of its time to its best time. Other devices' rows
remain.
``--dry-run`` prints the table and writes nothing.
"""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.backends.triton.tile_table import TABLE, Row
from adderkit.adder_layers.backends.triton.tiles import (
    KERNELS,
    TILED_WIDTH,
    WIDTHS,
    Device,
    Tile,
    fills,
    known_target,
    tiles_of,
    width_class,
)
from adderkit.adder_layers.geometry import Window

from ..cpu.layers import Layer, layers_of

PATH = Path(gpu.__file__).with_name("tile_table.py")
# Layers of a small batch leave a device partly idle, those of a large one fill it.
BATCHES = (2, 256)
WARPS = (2, 4, 8)
# Pieces and unrolled iterations: more of both spill registers, fewer of both load more than they add.
SHAPES = ((2, 4), (2, 8), (3, 4), (4, 4), (5, 4))
# A tile replaces the one in the table if it is faster by more than the noise of measurements.
WORTHWHILE = 0.98
# Milliseconds of one layer with one tile.
Time = Callable[[str, Layer, Tile], float]


def main() -> None:
    """Measure, then write or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "resnet18", "resnet50"])
    parser.add_argument("--most", type=int, default=2, help="layers to time for each entry (default: 2)")
    parser.add_argument("--dry-run", action="store_true", help="print the table instead of writing it")
    arguments = parser.parse_args()
    layers = [layer for model in arguments.models for layer in layers_of(model, "cuda")]
    device = gpu.device(torch.cuda.current_device())
    text = render({**TABLE, device.target: tune(layers, device, time_on_device, arguments.most)})
    if arguments.dry_run:
        print(text)
    else:
        PATH.write_text(text)


def candidates(width: int) -> list[Tile]:
    """Return the tiles of a width whose operands are loaded without shared memory."""
    return [Tile(width // 16, warps, *shape) for warps in WARPS for shape in SHAPES if width < 32 * warps]


def tune(layers: Iterable[Layer], device: Device, time: Time, most: int) -> dict[str, dict[int, Row]]:
    """Return the device's entry of the table.

    Args:
        layers: Layers to time, with each of ``BATCHES``.
        device: The device on which ``time`` measures.
        time: Function that returns milliseconds of a kernel on a layer with a tile; infinite if a tile does not work.
        most: Layers to time for each entry: those with the most terms.
    """
    cases: dict[tuple[str, int, bool], list[Layer]] = defaultdict(list)
    sized = {layer._replace(model="", input=(batch, *layer.input[1:])) for layer in layers for batch in BATCHES}
    for layer in sorted(sized, key=lambda layer: (-layer.terms, layer)):
        for kernel in KERNELS:
            width, positions, groups = work(kernel, layer)
            if layer.groups == 1 and width >= TILED_WIDTH:
                tile_width = width_class(width)
                large, _ = tiles_of(device.target, kernel, tile_width)
                cases[kernel, tile_width, fills(large, width, positions, groups, device)].append(layer)
    old = TABLE[known_target(device.target)]

    def entry(kernel: str, width: int, full: bool) -> tuple[int, int, int]:
        present = tiles_of(device.target, kernel, width)[0 if full else 1]
        row = old[kernel][width][0 if full else 1]
        ratios: dict[Tile, list[float]] = defaultdict(list)
        for layer in cases[kernel, width, full][:most]:
            times = {tile: time(kernel, layer, tile) for tile in candidates(width)}
            best = min(times.values())
            for tile, milliseconds in times.items():
                if best < math.inf:
                    ratios[tile].append(milliseconds / best)
        return fastest(ratios, present, row)

    return {
        kernel: {width: (entry(kernel, width, True), entry(kernel, width, False)) for width in WIDTHS}
        for kernel in KERNELS
    }


def work(kernel: str, layer: Layer) -> tuple[int, int, int]:
    """Return width, positions and groups of a layer, as ``choose_tile`` takes them."""
    batch, filters, rows, columns = layer.output
    if kernel == "forward":
        return filters, batch * rows * columns, 1
    _, _, height, width = layer.input
    return layer.weight[1], batch * -(-height // layer.stride) * -(-width // layer.stride), layer.stride**2


def fastest(times: dict[Tile, list[float]], present: Tile, row: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the tile with the least geometric mean of ratios, unless the present one is as good or none was timed."""
    means = {tile: statistics.fmean(map(math.log, ratios)) for tile, ratios in times.items()}
    if not means:
        return row
    best = min(sorted(means), key=lambda tile: means[tile])
    if means.get(present, math.inf) + math.log(WORTHWHILE) <= means[best]:
        return row
    return best.warps, best.pieces, best.unroll


def time_on_device(kernel: str, layer: Layer, tile: Tile) -> float:
    """Measure the median milliseconds of the kernel alone, with weights already packed."""
    from triton.testing import do_bench  # type: ignore[import-untyped]

    try:
        launch = launch_of(kernel, layer, tile)
        function = launch.function()[launch.grid]
        result: Any = do_bench(lambda: function(*launch.arguments, **launch.options), 5, 20, return_mode="median")
    except RuntimeError:  # a tile may need more registers than there are
        return math.inf
    return float(result)


def launch_of(kernel: str, layer: Layer, tile: Tile, device: str = "cuda") -> gpu.Launch:
    """Return the launch for a layer with a given tile, on random operands."""
    input, weight = torch.randn(layer.input, device=device), torch.randn(1, *layer.weight, device=device)
    window = Window.of(weight, *((value, value) for value in (layer.stride, layer.padding, 1)))
    output = torch.randn(layer.output, device=device)
    where = gpu.device(input.device.index) if device == "cuda" else Device(1)
    if kernel == "forward":
        return gpu.plan_forward(input, weight, output, window, layer.groups, where, tile)
    return gpu.plan_input_grad(output, input, weight, torch.empty_like(input), window, layer.groups, where, tile)


def render(table: dict[str, dict[str, dict[int, Row]]]) -> str:
    """Render the table's file, deterministically."""
    head = PATH.read_text().partition("TABLE: ")[0]
    lines = ["TABLE: dict[str, dict[str, dict[int, Row]]] = {"]
    for target in sorted(table, key=lambda name: (name[:3], len(name), name)):
        lines.append(f'    "{target}": {{')
        for kernel in KERNELS:
            row = ", ".join(f"{width}: {table[target][kernel][width]}" for width in WIDTHS)
            lines.append(f'        "{kernel}": {{{row}}},')
        lines.append("    },")
    return head + "\n".join([*lines, "}\n"])


if __name__ == "__main__":
    main()
