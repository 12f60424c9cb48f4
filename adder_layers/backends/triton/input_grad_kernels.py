"""Triton kernels of the adder convolution's input gradient; ``forward_kernels.py`` describes tiles and parameters.

Each input pixel gathers the contributions of its windows, so there are no atomics and two runs give the same bits.
"""

# Triton's language differs from Python: type checkers do not know its arguments, and its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

from .forward_kernels import NOWHERE, _inside, _offset, _split, _tile


@triton.jit
def _input_pixels(position, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width):
    """Return image, row and column of one phase, in units of the stride; missing pixels are far above the image."""
    image, row, column = _split(position, rows, columns)
    exists = (position < positions) & (row * stride_h + phase_h < height) & (column * stride_w + phase_w < width)
    return image, tl.where(exists, row, NOWHERE), column


@triton.jit
def _half_input(pixel, x_c, channel, channels, exists, OUTER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return ``x / 2``, ``[OUTER, ROWS, LANES]``: each thread's ``OUTER`` channels, starting at ``channel``.

    Each channel has a load of its own, because one load of them all would determine the layout of the hot loop.
    """
    outer = tl.arange(0, OUTER)[:, None, None]
    half = tl.zeros([OUTER, ROWS, LANES], tl.float32)
    for index in tl.static_range(OUTER):
        mask = exists & (channel + index < channels)
        x = tl.load(pixel + (channel + index).to(tl.int64) * x_c, mask=mask, other=0.0).to(tl.float32)
        half = tl.where(outer == index, tl.reshape(x * 0.5, [1, ROWS, LANES]), half)
    return half


@triton.jit
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
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``r[n,c,i] = Σ_{o,tap} g[n,o,p] · HardTanh(w[o,c,tap] - x[n,c,i])`` with p + tap = i.

    This is AdderNet's gradient (arXiv 1912.13200, section 3.2), not the derivative. Since
    ``HardTanh(t) = 2·clamp((t + 1) / 2, 0, 1) - 1``, the loop consists of a saturating subtraction of ``x / 2`` from
    the packed ``(w + 1) / 2``, ``[G, taps, O / G, tiles x width]``, and one FMA.

    ``x`` and ``result`` are ``[N, C, H, W]``, ``grad`` is ``[N, O, out_h, out_w]``. Programs are divided by phase, the
    remainders of row and column modulo the stride: within a phase a tap meets all pixels or none, and
    ``rows x columns`` counts the pixels of the largest phase.
    """
    CHANNELS: tl.constexpr = OUTER * LANES
    group, position, channel = _tile(channel_tiles, groups, OUTER, ROWS, LANES, PIECES)
    phase_h = tl.program_id(1) // stride_w
    phase_w = tl.program_id(1) % stride_w
    thread = tl.arange(0, ROWS * LANES)
    first_channel = tl.program_id(0) % channel_tiles * CHANNELS + thread % LANES * OUTER
    x_ptr += phase_h.to(tl.int64) * x_h + phase_w.to(tl.int64) * x_w + group.to(tl.int64) * channels * x_c
    grad_ptr += group.to(tl.int64) * filters * G_O
    pixels = ()
    halves = ()
    accs = ()
    totals = ()
    for piece in tl.static_range(PIECES):
        image, row, column = _input_pixels(
            position + piece * ROWS, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
        )
        x_pixel = x_ptr + _offset(image, row, column, x_n, x_h * stride_h, x_w * stride_w)
        pixels = pixels + ((image, row, column),)
        halves = halves + (_half_input(x_pixel, x_c, first_channel, channels, row >= 0, OUTER, ROWS, LANES),)
        accs = accs + (tl.zeros([OUTER, ROWS, LANES], tl.float32),)
        totals = totals + (tl.zeros([1, ROWS, LANES], tl.float32),)
    packed = channel_tiles * CHANNELS
    for tap in range(taps):
        up = phase_h + padding_h - tap // kernel_w * dilation_h
        left = phase_w + padding_w - tap % kernel_w * dilation_w
        # Exact division: the loop is empty where the stride does not divide, so rounding does not matter.
        meets = (up % stride_h == 0) & (left % stride_w == 0)
        up, left = up // stride_h, left // stride_w
        slopes = ()
        insides = ()
        for piece in tl.static_range(PIECES):
            image, row, column = pixels[piece]
            slopes = slopes + (grad_ptr + _offset(image, row + up, column + left, g_n, g_h, g_w),)
            insides = insides + (_inside(row + up, column + left, out_h, out_w),)
        w_row = w_ptr + (group.to(tl.int64) * taps + tap) * filters * packed
        for _ in tl.range(0, tl.where(meets, filters, 0), loop_unroll_factor=UNROLL):
            half_w = tl.load(w_row + channel, mask=True, other=0.0)  # [OUTER, 1, LANES], padded to whole tiles
            sums = ()
            slope_sums = ()
            following = ()
            for piece in tl.static_range(PIECES):
                g = tl.load(slopes[piece], mask=insides[piece], other=0.0).to(tl.float32)
                g = tl.reshape(g, [1, ROWS, LANES])
                sums = sums + (tl.fma(g, tl.clamp(half_w - halves[piece], 0.0, 1.0), accs[piece]),)
                slope_sums = slope_sums + (totals[piece] + g,)
                following = following + (slopes[piece] + G_O,)
            accs = sums
            totals = slope_sums
            slopes = following
            w_row += packed
    result_ptr += phase_h.to(tl.int64) * r_h + phase_w.to(tl.int64) * r_w
    offset = (group * channels + channel).to(tl.int64) * r_c
    for piece in tl.static_range(PIECES):
        image, row, column = pixels[piece]
        pixel = _offset(image, row, column, r_n, r_h * stride_h, r_w * stride_w)
        # Saturation turns NaN into 0; a NaN of the input is restored here.
        value = tl.where(halves[piece] == halves[piece], 2.0 * accs[piece] - totals[piece], halves[piece])
        mask = tl.reshape(row >= 0, [1, ROWS, LANES]) & (channel < channels)
        tl.store(result_ptr + (tl.reshape(pixel, [1, ROWS, LANES]) + offset), value, mask=mask)


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
    WIDTH: tl.constexpr,
):
    """``input_grad_tiled`` for thin groups, a ``[POSITIONS, WIDTH]`` tile of one phase of the input.

    ``w`` is ``[O, C / G, taps]`` as in the module; ``all_channels`` counts those of all groups.
    """
    program = tl.program_id(0)
    phase_h = tl.program_id(1) // stride_w
    phase_w = tl.program_id(1) % stride_w
    position = program // channel_tiles * POSITIONS + tl.arange(0, POSITIONS)
    channel = program % channel_tiles * WIDTH + tl.arange(0, WIDTH)
    kept = channel < all_channels
    image, row, column = _input_pixels(
        position, positions, rows, columns, phase_h, phase_w, stride_h, stride_w, height, width
    )
    stored = (row >= 0)[:, None] & kept[None, :]
    x_ptr += phase_h.to(tl.int64) * x_h + phase_w.to(tl.int64) * x_w
    x_pixel = _offset(image, row, column, x_n, x_h * stride_h, x_w * stride_w)
    x_pointer = x_ptr + (x_pixel[:, None] + (channel.to(tl.int64) * x_c)[None, :])
    x = tl.load(x_pointer, mask=stored, other=0.0).to(tl.float32)
    group = channel // channels
    first_filter = (group * filters).to(tl.int64)
    first_weight = (first_filter * channels + channel - group * channels) * taps
    acc = tl.zeros([POSITIONS, WIDTH], tl.float32)
    for tap_row in range(taps // kernel_w):
        up = phase_h + padding_h - tap_row * dilation_h
        for tap_column in range(tl.where(up % stride_h == 0, kernel_w, 0)):
            left = phase_w + padding_w - tap_column * dilation_w
            g_row, g_column = row + up // stride_h, column + left // stride_w
            inside = _inside(g_row, g_column, out_h, out_w)
            g_pixel = _offset(image, g_row, g_column, g_n, g_h, g_w)
            g_pointer = grad_ptr + (g_pixel[:, None] + (first_filter * g_o)[None, :])
            w_pointer = w_ptr + first_weight + tap_row * kernel_w + tap_column
            for _ in range(tl.where(left % stride_w == 0, filters, 0)):
                slope = tl.load(g_pointer, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)
                w = tl.load(w_pointer, mask=kept, other=0.0).to(tl.float32)
                acc += slope * tl.clamp(w[None, :] - x, -1.0, 1.0)
                g_pointer += g_o
                w_pointer += channels * taps
    result_ptr += phase_h.to(tl.int64) * r_h + phase_w.to(tl.int64) * r_w
    pixel = _offset(image, row, column, r_n, r_h * stride_h, r_w * stride_w)
    target = result_ptr + (pixel[:, None] + (channel.to(tl.int64) * r_c)[None, :])
    tl.store(target, tl.where(x == x, acc, x), mask=stored)
