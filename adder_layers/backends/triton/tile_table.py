"""Table of tiles by device; ``python -m benchmarks.gpu.tune`` writes this file.

``TABLE[target][kernel][width]`` is ``(warps, pieces, unroll)`` for layers that fill the device, then for those that do
not. ``width`` is the number of filters (forward) or channels (input gradient) in a tile.
"""

Row = tuple[tuple[int, int, int], tuple[int, int, int]]

TABLE: dict[str, dict[str, dict[int, Row]]] = {
    "gfx942": {
        "forward": {64: ((4, 4, 4), (4, 2, 4)), 32: ((4, 4, 4), (2, 4, 4)), 16: ((4, 4, 4), (2, 4, 4))},
        "input_grad": {64: ((4, 3, 4), (4, 2, 8)), 32: ((4, 3, 4), (2, 3, 4)), 16: ((4, 3, 4), (2, 3, 4))},
    },
    "sm_80": {
        "forward": {64: ((4, 4, 4), (4, 2, 4)), 32: ((4, 4, 4), (2, 4, 4)), 16: ((4, 4, 4), (2, 4, 4))},
        "input_grad": {64: ((4, 3, 4), (4, 2, 8)), 32: ((4, 3, 4), (2, 3, 4)), 16: ((4, 2, 8), (2, 2, 8))},
    },
    "sm_90": {
        "forward": {64: ((4, 4, 4), (4, 2, 4)), 32: ((4, 4, 4), (2, 4, 4)), 16: ((4, 4, 4), (2, 4, 4))},
        "input_grad": {64: ((4, 3, 4), (4, 2, 8)), 32: ((4, 3, 4), (2, 3, 4)), 16: ((4, 2, 8), (2, 2, 8))},
    },
    "sm_100": {
        "forward": {64: ((4, 4, 4), (4, 2, 4)), 32: ((4, 4, 4), (2, 4, 4)), 16: ((4, 4, 4), (2, 4, 4))},
        "input_grad": {64: ((4, 3, 4), (4, 2, 8)), 32: ((4, 3, 4), (2, 3, 4)), 16: ((4, 2, 8), (2, 2, 8))},
    },
}
