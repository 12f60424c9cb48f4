"""Triton kernels of the adder convolution's input gradient; ``conv_kernels.py`` explains the tiles.

Each input pixel gathers what its windows contribute, so there are no atomics and two runs give the same bits.
"""

# Triton's language is not Python's: its arguments have no types that a checker knows, its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
# mypy: ignore-errors

import triton
import triton.language as tl

from .conv_kernels import NOWHERE, _tap


@triton.jit
def _input_pixels(position, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width):
    """Split ``position`` of one phase: image, row and column in steps of the stride, and whether the pixel exists."""
    line = position // columns
    image = line // rows
    row = line - image * rows
    column = position - line * columns
    exists = (position < positions) & (row * stride_h + phase_h < height) & (column * stride_w + phase_w < width)
    return exists, image.to(tl.int64), row, column


@triton.jit
def _half_input(x_ptr, image, row, column, x_n, x_h, x_w, mask, channel_offset, channel_mask):
    """``x / 2`` and its place, ``[OUTER, WARPS, ROW_LANES, COLUMN_LANES]``."""
    pointer = x_ptr + image * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w + channel_offset
    return tl.load(pointer, mask=mask & channel_mask, other=0.0).to(tl.float32) * 0.5


@triton.jit
def _add_slopes(acc, total, slope, half_w, half_x):
    """Add one term to ``Σ g·clamp((w - x + 1) / 2, 0, 1)`` and to ``Σ g``: a saturating subtraction and an FMA."""
    return tl.fma(slope, tl.clamp(half_w - half_x, 0.0, 1.0), acc), total + slope


@triton.jit
def _store_input_grad(result_ptr, acc, total, half_x, image, row, column, r_n, r_h, r_w, mask, offset, channel_mask):
    """``2·acc - total``; saturation turns NaN into 0, so a NaN input puts it back."""
    value = tl.where(half_x == half_x, 2.0 * acc - total, half_x)
    target = result_ptr + image * r_n + row.to(tl.int64) * r_h + column.to(tl.int64) * r_w + offset
    tl.store(target, value, mask=mask & channel_mask)


# Strides of x stay variables even where they are 1: Triton would lay the whole loop out to suit that one wide load.
@triton.jit(do_not_specialize=["x_c", "x_w"])
def input_grad_tiled(
    grad_ptr,
    x_ptr,
    w_ptr,
    result_ptr,
    channels,
    channel_tiles,
    filters,
    groups,
    height,
    width,
    out_h,
    out_w,
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
    g_n,
    g_h,
    g_w,
    r_n,
    r_c,
    r_h,
    r_w,
    G_O: tl.constexpr,
    OUTER: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``r[n,c,i] = Σ_{o,tap} g[n,o,p] · HardTanh(w[o,c,tap] - x[n,c,i])``, p + tap = i: AdderNet's, not the derivative.

    arXiv 1912.13200, section 3.2. ``HardTanh(t) = 2·clamp((t + 1) / 2, 0, 1) - 1``, so the loop holds a saturating
    subtraction of ``x / 2`` from the packed ``(w + 1) / 2``, ``[G, taps, O / G, tiles x width]``, and one FMA.

    Programs are split by phase, the remainders of row and column by the stride: within a phase a tap meets all pixels
    or none, and ``rows x columns`` counts the pixels of the largest phase. ``x`` and ``result`` are ``[N, C, H, W]``.
    """
    PIECE: tl.constexpr = WARPS * ROW_LANES
    CHANNELS: tl.constexpr = OUTER * COLUMN_LANES
    program = tl.program_id(0)
    channel_tile = program % channel_tiles
    group = program // channel_tiles % groups
    phase_h = tl.program_id(1) // stride_w
    phase_w = tl.program_id(1) % stride_w
    lane = tl.arange(0, WARPS)[None, :, None, None] * ROW_LANES + tl.arange(0, ROW_LANES)[None, None, :, None]
    position = program // channel_tiles // groups * (3 * PIECE) + lane  # [1, WARPS, ROW_LANES, 1]
    column_lane = tl.arange(0, COLUMN_LANES)[None, None, None, :] * OUTER
    channel = channel_tile * CHANNELS + column_lane + tl.arange(0, OUTER)[:, None, None, None]
    kept = channel < channels
    exists0, image0, row0, column0 = _input_pixels(
        position, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
    )
    exists1, image1, row1, column1 = _input_pixels(
        position + PIECE, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
    )
    exists2, image2, row2, column2 = _input_pixels(
        position + 2 * PIECE, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
    )
    x_ptr += phase_h.to(tl.int64) * x_h + phase_w.to(tl.int64) * x_w
    result_ptr += phase_h.to(tl.int64) * r_h + phase_w.to(tl.int64) * r_w
    x_offset = (group * channels + channel).to(tl.int64) * x_c
    x_row, x_column = x_h * stride_h, x_w * stride_w
    half0 = _half_input(x_ptr, image0, row0, column0, x_n, x_row, x_column, exists0, x_offset, kept)
    half1 = _half_input(x_ptr, image1, row1, column1, x_n, x_row, x_column, exists1, x_offset, kept)
    half2 = _half_input(x_ptr, image2, row2, column2, x_n, x_row, x_column, exists2, x_offset, kept)
    acc0 = tl.zeros([OUTER, WARPS, ROW_LANES, COLUMN_LANES], tl.float32)
    acc1 = acc0
    acc2 = acc0
    total0 = tl.zeros([1, WARPS, ROW_LANES, COLUMN_LANES], tl.float32)
    total1 = total0
    total2 = total0
    grad_ptr += group.to(tl.int64) * filters * G_O
    packed = channel_tiles * CHANNELS
    for tap in range(taps):
        up = phase_h + padding_h - tap // kernel_w * dilation_h
        left = phase_w + padding_w - tap % kernel_w * dilation_w
        # Exact division: the loop is empty where the stride does not divide, so rounding does not matter.
        meets = (up % stride_h == 0) & (left % stride_w == 0)
        up, left = up // stride_h, left // stride_w
        g0, in0 = _tap(
            grad_ptr + image0 * g_n, tl.where(exists0, row0 + up, NOWHERE), column0 + left, out_h, out_w, g_h, g_w
        )
        g1, in1 = _tap(
            grad_ptr + image1 * g_n, tl.where(exists1, row1 + up, NOWHERE), column1 + left, out_h, out_w, g_h, g_w
        )
        g2, in2 = _tap(
            grad_ptr + image2 * g_n, tl.where(exists2, row2 + up, NOWHERE), column2 + left, out_h, out_w, g_h, g_w
        )
        w_base = w_ptr + (group.to(tl.int64) * taps + tap) * filters * packed
        for _ in tl.range(0, tl.where(meets, filters, 0), loop_unroll_factor=UNROLL):
            half_w = tl.load(w_base + channel, mask=True, other=0.0)  # [OUTER, 1, 1, COLUMN_LANES], whole tiles
            slope0 = tl.load(g0, mask=in0, other=0.0).to(tl.float32)  # [1, WARPS, ROW_LANES, 1]
            slope1 = tl.load(g1, mask=in1, other=0.0).to(tl.float32)
            slope2 = tl.load(g2, mask=in2, other=0.0).to(tl.float32)
            acc0, total0 = _add_slopes(acc0, total0, slope0, half_w, half0)
            acc1, total1 = _add_slopes(acc1, total1, slope1, half_w, half1)
            acc2, total2 = _add_slopes(acc2, total2, slope2, half_w, half2)
            w_base += packed
            g0 += G_O
            g1 += G_O
            g2 += G_O
    offset = (group * channels + channel).to(tl.int64) * r_c
    r_row, r_column = r_h * stride_h, r_w * stride_w
    _store_input_grad(
        result_ptr, acc0, total0, half0, image0, row0, column0, r_n, r_row, r_column, exists0, offset, kept
    )
    _store_input_grad(
        result_ptr, acc1, total1, half1, image1, row1, column1, r_n, r_row, r_column, exists1, offset, kept
    )
    _store_input_grad(
        result_ptr, acc2, total2, half2, image2, row2, column2, r_n, r_row, r_column, exists2, offset, kept
    )


@triton.jit
def input_grad_direct(
    grad_ptr,
    x_ptr,
    w_ptr,
    result_ptr,
    channels,
    all_channels,
    channel_tiles,
    filters,
    height,
    width,
    out_h,
    out_w,
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
    g_n,
    g_o,
    g_h,
    g_w,
    r_n,
    r_c,
    r_h,
    r_w,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``input_grad_tiled`` for thin groups, a ``[POSITIONS, CHANNELS]`` tile of one phase of the input.

    ``w`` is ``[O, C / G, taps]`` as in the module; ``filters`` and ``channels`` are those of a group.
    """
    program = tl.program_id(0)
    phase_h = tl.program_id(1) // stride_w
    phase_w = tl.program_id(1) % stride_w
    position = program // channel_tiles * POSITIONS + tl.arange(0, POSITIONS)
    channel = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    kept = channel < all_channels
    exists, image, row, column = _input_pixels(
        position, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
    )
    x_ptr += phase_h.to(tl.int64) * x_h + phase_w.to(tl.int64) * x_w
    x_pixel = x_ptr + image * x_n + row.to(tl.int64) * (x_h * stride_h) + column.to(tl.int64) * (x_w * stride_w)
    x_pointer = x_pixel[:, None] + (channel.to(tl.int64) * x_c)[None, :]
    x = tl.load(x_pointer, mask=exists[:, None] & kept[None, :], other=0.0).to(tl.float32)
    group = channel // channels
    first_filter = (group * filters).to(tl.int64)
    first_weight = (first_filter * channels + channel - group * channels) * taps
    acc = tl.zeros([POSITIONS, CHANNELS], tl.float32)
    for tap in range(taps):
        up = phase_h + padding_h - tap // kernel_w * dilation_h
        left = phase_w + padding_w - tap % kernel_w * dilation_w
        meets = (up % stride_h == 0) & (left % stride_w == 0)
        top = tl.where(exists, row + up // stride_h, NOWHERE)
        g_pixel, inside = _tap(grad_ptr + image * g_n, top, column + left // stride_w, out_h, out_w, g_h, g_w)
        g_pointer = g_pixel[:, None] + (first_filter * g_o)[None, :]
        w_pointer = w_ptr + first_weight + tap
        for _ in range(tl.where(meets, filters, 0)):
            slope = tl.load(g_pointer, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)
            w = tl.load(w_pointer, mask=kept, other=0.0).to(tl.float32)
            acc += slope * tl.clamp(w[None, :] - x, -1.0, 1.0)
            g_pointer += g_o
            w_pointer += channels * taps
    result_ptr += phase_h.to(tl.int64) * r_h + phase_w.to(tl.int64) * r_w
    pixel = result_ptr + image * r_n + row.to(tl.int64) * (r_h * stride_h) + column.to(tl.int64) * (r_w * stride_w)
    target = pixel[:, None] + (channel.to(tl.int64) * r_c)[None, :]
    tl.store(target, tl.where(x == x, acc, x), mask=exists[:, None] & kept[None, :])
