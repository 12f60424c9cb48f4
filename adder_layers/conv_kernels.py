"""Triton kernels of the adder convolution's forward pass, straight from memory in any layout.

Forward and input gradient (``conv_grad_kernels.py``) each come twice. The tiled kernels compare positions with filters
(or channels) one term at a time; the direct kernels serve depthwise and thin groups, where such a tile would be empty.

A tile has four axes, ``[registers, warps, lanes along positions, lanes along filters]``. Triton gives lanes to the last
axes, then warps, and keeps the first in registers, so the shape of a tile is its layout: each thread holds 16 filters
by one position of each piece. With four pieces, 20 values that it loads serve 64 terms. A piece has so few elements
that Triton loads each value where it is needed, from the first-level cache: the loop has no shared memory or barrier.

Padded taps read 0 and count (``|0 - w|``); tails of a tile are computed in vain and not stored; loops over terms have
no tail. Weights are packed by ``gpu.py`` into whole tiles, ``[groups, taps, terms, width]`` in fp32, so that a read of
them is never out of bounds.
"""

# Triton's language is not Python's: its arguments have no types that a checker knows, its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
# mypy: ignore-errors

import triton
import triton.language as tl

# A row so far above the image that no tap reaches it.
NOWHERE = tl.constexpr(-(1 << 30))


@triton.jit
def _pixels(position, rows, columns, image_stride, ptr):
    """Split ``position`` into image, row and column: a pointer to the image, the row, the column."""
    line = position // columns
    image = line // rows
    return ptr + image.to(tl.int64) * image_stride, line - image * rows, position - line * columns


@triton.jit
def _corner(position, positions, rows, columns, stride_h, stride_w, image_stride, ptr):
    """Pointer to the image, row and column of a window's corner; what does not exist is far above the image."""
    image, row, column = _pixels(position, rows, columns, image_stride, ptr)
    return image, tl.where(position < positions, row * stride_h, NOWHERE), column * stride_w


@triton.jit
def _tap(image, row, column, height, width, row_stride, column_stride):
    """Pointers to one pixel per position, and which of them lie inside the image and may be read."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return image + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride, inside


@triton.jit
def _store_output(y_ptr, acc, position, positions, rows, columns, y_n, y_h, y_w, filter_offset, filter_mask):
    image, row, column = _pixels(position, rows, columns, y_n, y_ptr)
    target = image + row.to(tl.int64) * y_h + column.to(tl.int64) * y_w + filter_offset
    tl.store(target, (-acc).to(y_ptr.dtype.element_ty), mask=(position < positions) & filter_mask)


@triton.jit
def forward_tiled(
    x_ptr,
    w_ptr,
    y_ptr,
    channels,
    filters,
    filter_tiles,
    groups,
    height,
    width,
    rows,
    columns,
    positions,
    kernel_w,
    taps,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    x_n,
    x_h,
    x_w,
    y_n,
    y_o,
    y_h,
    y_w,
    X_C: tl.constexpr,
    OUTER: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``y[n,o,p] = -Σ_{c,tap} |x[n,c,p+tap] - w[o,c,tap]|`` (AdderNet, arXiv 1912.13200, equation 1).

    ``x`` is ``[N, C, H, W]`` and ``y`` ``[N, O, H', W']`` by strides; ``w`` is packed ``[G, taps, C / G, width]``.
    ``channels`` and ``filters`` are those of a group. A program makes four pieces of ``WARPS x ROW_LANES`` positions by
    ``OUTER x COLUMN_LANES`` filters. The channel stride is a constant: an unrolled loop then adds no addresses.
    """
    PIECE: tl.constexpr = WARPS * ROW_LANES
    FILTERS: tl.constexpr = OUTER * COLUMN_LANES
    program = tl.program_id(0)
    filter_tile = program % filter_tiles
    group = program // filter_tiles % groups
    lane = tl.arange(0, WARPS)[None, :, None, None] * ROW_LANES + tl.arange(0, ROW_LANES)[None, None, :, None]
    position = program // filter_tiles // groups * (4 * PIECE) + lane  # [1, WARPS, ROW_LANES, 1]
    column_lane = tl.arange(0, COLUMN_LANES)[None, None, None, :] * OUTER
    filter = filter_tile * FILTERS + column_lane + tl.arange(0, OUTER)[:, None, None, None]
    x_ptr += group.to(tl.int64) * channels * X_C
    image0, row0, column0 = _corner(position, positions, rows, columns, stride_h, stride_w, x_n, x_ptr)
    image1, row1, column1 = _corner(position + PIECE, positions, rows, columns, stride_h, stride_w, x_n, x_ptr)
    image2, row2, column2 = _corner(position + 2 * PIECE, positions, rows, columns, stride_h, stride_w, x_n, x_ptr)
    image3, row3, column3 = _corner(position + 3 * PIECE, positions, rows, columns, stride_h, stride_w, x_n, x_ptr)
    acc0 = tl.zeros([OUTER, WARPS, ROW_LANES, COLUMN_LANES], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    packed = filter_tiles * FILTERS
    w_base = w_ptr + group.to(tl.int64) * taps * channels * packed
    for tap in range(taps):
        down = tap // kernel_w * dilation_h - padding_h
        right = tap % kernel_w * dilation_w - padding_w
        x0, in0 = _tap(image0, row0 + down, column0 + right, height, width, x_h, x_w)
        x1, in1 = _tap(image1, row1 + down, column1 + right, height, width, x_h, x_w)
        x2, in2 = _tap(image2, row2 + down, column2 + right, height, width, x_h, x_w)
        x3, in3 = _tap(image3, row3 + down, column3 + right, height, width, x_h, x_w)
        for _ in tl.range(0, channels, loop_unroll_factor=UNROLL):
            w = tl.load(w_base + filter, mask=True, other=0.0)  # [OUTER, 1, 1, COLUMN_LANES], padded to whole tiles
            acc0 += tl.abs(tl.load(x0, mask=in0, other=0.0).to(tl.float32) - w)
            acc1 += tl.abs(tl.load(x1, mask=in1, other=0.0).to(tl.float32) - w)
            acc2 += tl.abs(tl.load(x2, mask=in2, other=0.0).to(tl.float32) - w)
            acc3 += tl.abs(tl.load(x3, mask=in3, other=0.0).to(tl.float32) - w)
            w_base += packed
            x0 += X_C
            x1 += X_C
            x2 += X_C
            x3 += X_C
    kept = filter < filters
    offset = (group * filters + filter).to(tl.int64) * y_o
    _store_output(y_ptr, acc0, position, positions, rows, columns, y_n, y_h, y_w, offset, kept)
    _store_output(y_ptr, acc1, position + PIECE, positions, rows, columns, y_n, y_h, y_w, offset, kept)
    _store_output(y_ptr, acc2, position + 2 * PIECE, positions, rows, columns, y_n, y_h, y_w, offset, kept)
    _store_output(y_ptr, acc3, position + 3 * PIECE, positions, rows, columns, y_n, y_h, y_w, offset, kept)


@triton.jit
def forward_direct(
    x_ptr,
    w_ptr,
    y_ptr,
    channels,
    filters,
    all_filters,
    filter_tiles,
    height,
    width,
    rows,
    columns,
    positions,
    kernel_w,
    taps,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_o,
    y_h,
    y_w,
    POSITIONS: tl.constexpr,
    FILTERS: tl.constexpr,
):
    """``forward_tiled`` for thin groups: each element of a ``[POSITIONS, FILTERS]`` tile reads operands of its own.

    ``w`` is ``[O, C / G, taps]`` as in the module; ``filters`` and ``channels`` are those of a group.
    """
    program = tl.program_id(0)
    position = program // filter_tiles * POSITIONS + tl.arange(0, POSITIONS)
    filter = program % filter_tiles * FILTERS + tl.arange(0, FILTERS)
    kept = filter < all_filters
    image, row, column = _corner(position, positions, rows, columns, stride_h, stride_w, x_n, x_ptr)
    first_channel = (filter // filters * channels).to(tl.int64) * x_c
    acc = tl.zeros([POSITIONS, FILTERS], tl.float32)
    for tap in range(taps):
        down = tap // kernel_w * dilation_h - padding_h
        right = tap % kernel_w * dilation_w - padding_w
        pixel, inside = _tap(image, row + down, column + right, height, width, x_h, x_w)
        pointer = pixel[:, None] + first_channel[None, :]
        w_pointer = w_ptr + filter.to(tl.int64) * channels * taps + tap
        for _ in range(channels):
            x = tl.load(pointer, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)
            w = tl.load(w_pointer, mask=kept, other=0.0).to(tl.float32)
            acc += tl.abs(x - w[None, :])
            pointer += x_c
            w_pointer += taps
    offset = filter.to(tl.int64) * y_o
    _store_output(
        y_ptr, acc, position[:, None], positions, rows, columns, y_n, y_h, y_w, offset[None, :], kept[None, :]
    )
