"""The tuning script, with a timer of our own instead of a device."""

import math

import pytest

pytest.importorskip("triton")

from adderkit.adder_layers.backends.triton.tile_table import TABLE
from adderkit.adder_layers.backends.triton.tiles import (
    KERNELS,
    WIDTHS,
    Device,
    Tile,
    choose_tile,
    known_target,
    tiles_of,
)
from benchmarks.cpu.layers import Layer
from benchmarks.gpu import tune

HOPPER = Device(132, 32, "sm_90")
LAYERS = [
    Layer("a", (256, channels, 28, 28), (channels, channels, 3, 3), stride, 1, 1)
    for channels in (16, 32, 64)
    for stride in (1, 2)
]


def test_the_shipped_table_is_what_the_script_writes():
    assert tune.render(TABLE) == tune.PATH.read_text()


def test_the_fastest_tile_wins_and_only_where_it_is_faster():
    def time(kernel, layer, tile):
        return 1.0 if (tile.warps, tile.pieces, tile.unroll) == (8, 5, 4) else 2.0

    tuned = tune.tune(LAYERS, HOPPER, time, most=2)
    assert {kernel: set(rows) for kernel, rows in tuned.items()} == {kernel: set(WIDTHS) for kernel in KERNELS}
    assert tuned["forward"][64][0] == (8, 5, 4)
    assert tune.tune(LAYERS, HOPPER, lambda *_: 1.0, most=2) == TABLE["sm_90"]


def test_entries_without_a_layer_stay():
    assert tune.tune([], HOPPER, lambda *_: math.nan, most=2) == TABLE["sm_90"]


def test_a_device_on_which_nothing_works_keeps_its_rows():
    assert tune.tune(LAYERS, HOPPER, lambda *_: math.inf, most=2) == TABLE["sm_90"]


def test_a_tile_that_does_not_work_is_not_chosen():
    def time(kernel, layer, tile):
        return 1.0 if tile.warps == 4 else math.inf

    tuned = tune.tune(LAYERS, HOPPER, time, most=1)
    assert all(warps == 4 for rows in tuned.values() for row in rows.values() for warps, *_ in row)


def test_a_written_table_can_be_read_back():
    new = {**TABLE, "sm_120": TABLE["sm_80"]}
    namespace = {}
    exec(tune.render(new), namespace)
    assert namespace["TABLE"] == new


def test_a_launch_takes_the_tile_it_is_given():
    layer = LAYERS[0]._replace(input=(2, 16, 8, 8))
    for kernel in KERNELS:
        launch = tune.launch_of(kernel, layer, Tile(1, 8, 5, 4), "cpu")
        assert launch.kernel == f"{kernel}_tiled"
        assert (launch.options["ROWS"], launch.options["PIECES"], launch.options["num_warps"]) == (256, 5, 8)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_120", "sm_100")],
)
def test_an_unknown_device_takes_the_nearest_lower(target, expected):
    assert known_target(target) == expected


def test_devices_below_or_beside_the_table_get_a_row_too():
    assert known_target("sm_75") == "sm_80"
    assert known_target("gfx90a") == "gfx942"


def test_every_row_can_be_launched():
    for target in TABLE:
        for kernel in KERNELS:
            for width in WIDTHS:
                for tile in tiles_of(target, kernel, width):
                    assert tile.width == width < 32 * tile.warps
                    assert tile.rows * tile.lanes == 32 * tile.warps


def test_small_layers_get_the_small_tile():
    large, small = tiles_of("sm_90", "forward", 64)
    assert choose_tile("forward", 64, 1 << 20, 1, HOPPER) == large
    assert choose_tile("forward", 64, 100, 1, HOPPER) == small
