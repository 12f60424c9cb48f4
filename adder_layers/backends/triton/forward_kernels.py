"""Triton kernels of the adder convolution's forward pass, which read tensors of any layout.

Forward and input gradient (``input_grad_kernels.py``) have two kernels each. The tiled kernels compare positions with
filters (or channels) one term at a time; the direct kernels are for depthwise layers and thin groups, where most of
such a tile would be empty.

A tile is ``[OUTER, ROWS, LANES]``. Triton assigns the lanes of a warp to the last axes, then warps, and keeps the first
in registers, so the shape is the layout: a thread holds ``OUTER`` filters at one position of each of ``PIECES`` pieces.
With 16 filters and four pieces, a thread loads 20 values for 64 terms. Operands are so small that Triton loads each
where it is needed, from the first-level cache: the loop has no shared memory and no barrier. Values of a position are a
single axis with one element per thread, reshaped to the tile after loading: Triton lays out a load with more axes to
suit that load alone, differently from version to version, and then the hot loop with it.

Padded taps read 0 and count (``|0 - w|``). Tails of a tile are computed but not stored; loops over terms have no tail.
``launch.py`` packs weights into whole tiles, ``[groups, T, taps, C / G, width]`` in fp32, so that reading them is never
out of bounds. The ``T`` terms of a weight come last to first, and sums are halved between them, which leaves term j
with the factor ``2^-j``.

Names of parameters, in all kernels of the convolution:

- ``geometry``: sizes, positions and window, ``launch.Geometry``; ``x_strides``, ``y_strides``, ``grad_strides``,
  ``result_strides``: strides of a tensor in elements, ``launch.Strides``.
- ``channels, filters``: of one group; ``filter_tiles``, ``channel_tiles``: number of tiles along them.
- ``TERMS``: terms of a weight.
- ``OUTER, ROWS, LANES``: shape of the tile; ``PIECES``: pieces of a program; ``UNROLL``: terms per iteration;
  ``POSITIONS, WIDTH``: shape of a direct kernel's tile.
"""

# Triton's language differs from Python: type checkers do not know its arguments, and its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

# A row so far above the image that no tap reaches it.
NOWHERE = tl.constexpr(-(1 << 30))


@triton.jit
def _columns(OUTER: tl.constexpr, LANES: tl.constexpr):
    """Return a tile's filters or channels, ``[OUTER, 1, LANES]``; those of a thread are neighbors in memory."""
    return tl.arange(0, OUTER)[:, None, None] + tl.arange(0, LANES)[None, None, :] * OUTER


@triton.jit
def _tile(tiles, groups, OUTER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PIECES: tl.constexpr):
    """Return the group of a tiled kernel's program, the positions of its first piece, and its filters or channels."""
    program = tl.program_id(0)
    group = program // tiles % groups
    position = program // tiles // groups * (PIECES * ROWS) + tl.arange(0, ROWS * LANES) // LANES
    return group, position, program % tiles * (OUTER * LANES) + _columns(OUTER, LANES)


@triton.jit
def _split(position, rows, columns):
    """Return image, row and column of positions."""
    line = position // columns
    image = line // rows
    return image, line - image * rows, position - line * columns


@triton.jit
def _offset(image, row, column, image_stride, row_stride, column_stride):
    """Return the distance in elements from a tensor's first pixel to other pixels."""
    return image.to(tl.int64) * image_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride


@triton.jit
def _pixel(image, row, column, strides):
    """Return the distance in elements from a tensor's first pixel to other pixels, by the tensor's ``Strides``."""
    return _offset(image, row, column, strides.n, strides.h, strides.w)


@triton.jit
def _inside(row, column, height, width):
    """Return whether pixels are inside the image."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def _corner(position, geometry):
    """Return image, row and column of windows before padding; missing positions are far above the image."""
    image, row, column = _split(position, geometry.rows, geometry.columns)
    row = tl.where(position < geometry.positions, row * geometry.stride_h, NOWHERE)
    return image, row, column * geometry.stride_w


@triton.jit
def forward_tiled(
    x_ptr,
    w_ptr,
    y_ptr,
    channels,
    filters,
    filter_tiles,
    groups,
    geometry,
    x_strides,
    y_strides,
    X_C: tl.constexpr,
    TERMS: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``y[n,o,p] = -Σ_{c,tap} |x[n,c,p+tap] - w[o,c,tap]|`` (AdderNet, arXiv 1912.13200, equation 1).

    ``x`` is ``[N, C, H, W]`` and ``y`` ``[N, O, H', W']``, both of any strides; ``w`` is packed
    ``[G, T, taps, C / G, width]``. A program computes ``PIECES x ROWS`` positions by ``OUTER x LANES`` filters. The
    channel stride ``X_C`` is a constant, so that an unrolled loop adds no addresses.
    """
    FILTERS: tl.constexpr = OUTER * LANES
    group, position, filter = _tile(filter_tiles, groups, OUTER, ROWS, LANES, PIECES)
    x_ptr += group.to(tl.int64) * channels * X_C
    w_row = w_ptr + group.to(tl.int64) * TERMS * geometry.taps * channels * (filter_tiles * FILTERS)
    corners = ()
    accs = ()
    for piece in tl.static_range(PIECES):
        place = position + piece * ROWS
        corners = corners + (_corner(place, geometry),)
        accs = accs + (tl.zeros([OUTER, ROWS, LANES], tl.float32),)
    for term in tl.static_range(TERMS):
        if term > 0:
            halves = ()
            for piece in tl.static_range(PIECES):
                halves = halves + (accs[piece] * 0.5,)
            accs = halves
        for tap in range(geometry.taps):
            down = tap // geometry.kernel_w * geometry.dilation_h - geometry.padding_h
            right = tap % geometry.kernel_w * geometry.dilation_w - geometry.padding_w
            pixels = ()
            insides = ()
            for piece in tl.static_range(PIECES):
                image, row, column = corners[piece]
                pixels = pixels + (x_ptr + _pixel(image, row + down, column + right, x_strides),)
                insides = insides + (_inside(row + down, column + right, geometry.height, geometry.width),)
            for _ in tl.range(0, channels, loop_unroll_factor=UNROLL):
                w = tl.load(w_row + filter, mask=True, other=0.0)  # [OUTER, 1, LANES], padded to whole tiles
                sums = ()
                following = ()
                for piece in tl.static_range(PIECES):
                    x = tl.load(pixels[piece], mask=insides[piece], other=0.0).to(tl.float32)
                    sums = sums + (accs[piece] + tl.abs(tl.reshape(x, [1, ROWS, LANES]) - w),)
                    following = following + (pixels[piece] + X_C,)
                accs = sums
                pixels = following
                w_row += filter_tiles * FILTERS
    offset = (group * filters + filter).to(tl.int64) * y_strides.c
    for piece in tl.static_range(PIECES):
        place = position + piece * ROWS
        image, row, column = _split(place, geometry.rows, geometry.columns)
        pixel = tl.reshape(_pixel(image, row, column, y_strides), [1, ROWS, LANES])
        exists = tl.reshape(place < geometry.positions, [1, ROWS, LANES])
        result = (-accs[piece]).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (pixel + offset), result, mask=exists & (filter < filters))


@triton.jit
def forward_direct(
    x_ptr,
    w_ptr,
    y_ptr,
    channels,
    filters,
    all_filters,
    filter_tiles,
    geometry,
    x_strides,
    y_strides,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``forward_tiled`` for thin groups: each element of a ``[POSITIONS, WIDTH]`` tile reads operands of its own.

    ``w`` is ``[T, O, C / G, taps]``; ``all_filters`` counts those of all groups.
    """
    program = tl.program_id(0)
    position = program // filter_tiles * POSITIONS + tl.arange(0, POSITIONS)
    filter = program % filter_tiles * WIDTH + tl.arange(0, WIDTH)
    kept = filter < all_filters
    image, row, column = _corner(position, geometry)
    first_channel = (filter // filters * channels).to(tl.int64) * x_strides.c
    acc = tl.zeros([POSITIONS, WIDTH], tl.float32)
    for term in tl.static_range(TERMS):
        if term > 0:
            acc *= 0.5
        for tap_row in range(geometry.taps // geometry.kernel_w):
            down = tap_row * geometry.dilation_h - geometry.padding_h
            for tap_column in range(geometry.kernel_w):
                right = tap_column * geometry.dilation_w - geometry.padding_w
                inside = _inside(row + down, column + right, geometry.height, geometry.width)
                pixel = x_ptr + _pixel(image, row + down, column + right, x_strides)
                pointer = pixel[:, None] + first_channel[None, :]
                w_pointer = (
                    w_ptr + filter.to(tl.int64) * channels * geometry.taps + tap_row * geometry.kernel_w + tap_column
                )
                for _ in range(channels):
                    x = tl.load(pointer, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)
                    w = tl.load(w_pointer, mask=kept, other=0.0).to(tl.float32)
                    acc += tl.abs(x - w[None, :])
                    pointer += x_strides.c
                    w_pointer += geometry.taps
        w_ptr += all_filters.to(tl.int64) * channels * geometry.taps
    image, row, column = _split(position, geometry.rows, geometry.columns)
    target = y_ptr + _pixel(image, row, column, y_strides)[:, None] + (filter.to(tl.int64) * y_strides.c)[None, :]
    tl.store(target, (-acc).to(y_ptr.dtype.element_ty), mask=(position < geometry.positions)[:, None] & kept[None, :])
