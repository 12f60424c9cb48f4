"""Triton kernels of the adder convolution's input gradient; ``forward_kernels.py`` describes tiles and parameters.

Each input pixel gathers the contributions of its windows, so there are no atomics and two runs give the same bits.
"""

# Triton's language differs from Python: type checkers do not know its arguments, and its constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

from .forward_kernels import NOWHERE, _inside, _offset, _pixel, _split, _tile


@triton.jit
def _input_pixels(position, geometry, phase_h, phase_w):
    """Return image, row and column of one phase, in units of the stride; missing pixels are far above the image."""
    image, row, column = _split(position, geometry.rows, geometry.columns)
    below, right = row * geometry.stride_h + phase_h, column * geometry.stride_w + phase_w
    exists = (position < geometry.positions) & (below < geometry.height) & (right < geometry.width)
    return image, tl.where(exists, row, NOWHERE), column


@triton.jit
def _phase_pixel(image, row, column, strides, geometry):
    """Return ``_pixel`` for rows and columns in units of the stride."""
    return _offset(image, row, column, strides.n, strides.h * geometry.stride_h, strides.w * geometry.stride_w)


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
    geometry,
    x_strides,
    grad_strides,
    result_strides,
    G_O: tl.constexpr,
    TERMS: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``r[n,c,i] = Σ_{o,tap} g[n,o,p] · HardTanh(w[o,c,tap] - x[n,c,i])`` with p + tap = i.

    This is AdderNet's gradient (arXiv 1912.13200, section 3.2), not the derivative. Since
    ``HardTanh(t) = 2·clamp((t + 1) / 2, 0, 1) - 1``, the loop consists of a saturating subtraction of ``x / 2`` from
    the packed ``(w + 1) / 2``, ``[G, T, taps, O / G, tiles x width]``, and one FMA.

    ``x`` and ``result`` are ``[N, C, H, W]``, ``grad`` is ``[N, O, out_h, out_w]``. Programs are divided by phase, the
    remainders of row and column modulo the stride: within a phase a tap meets all pixels or none, and
    ``rows x columns`` counts the pixels of the largest phase.
    """
    CHANNELS: tl.constexpr = OUTER * LANES
    group, position, channel = _tile(channel_tiles, groups, OUTER, ROWS, LANES, PIECES)
    phase_h = tl.program_id(1) // geometry.stride_w
    phase_w = tl.program_id(1) % geometry.stride_w
    thread = tl.arange(0, ROWS * LANES)
    first_channel = tl.program_id(0) % channel_tiles * CHANNELS + thread % LANES * OUTER
    x_ptr += (
        phase_h.to(tl.int64) * x_strides.h
        + phase_w.to(tl.int64) * x_strides.w
        + group.to(tl.int64) * channels * x_strides.c
    )
    grad_ptr += group.to(tl.int64) * filters * G_O
    pixels = ()
    halves = ()
    accs = ()
    totals = ()
    for piece in tl.static_range(PIECES):
        image, row, column = _input_pixels(position + piece * ROWS, geometry, phase_h, phase_w)
        x_pixel = x_ptr + _phase_pixel(image, row, column, x_strides, geometry)
        pixels = pixels + ((image, row, column),)
        halves = halves + (_half_input(x_pixel, x_strides.c, first_channel, channels, row >= 0, OUTER, ROWS, LANES),)
        accs = accs + (tl.zeros([OUTER, ROWS, LANES], tl.float32),)
        totals = totals + (tl.zeros([1, ROWS, LANES], tl.float32),)
    packed = channel_tiles * CHANNELS
    for term in tl.static_range(TERMS):
        if term > 0:
            sums = ()
            slope_sums = ()
            for piece in tl.static_range(PIECES):
                sums = sums + (accs[piece] * 0.5,)
                slope_sums = slope_sums + (totals[piece] * 0.5,)
            accs = sums
            totals = slope_sums
        for tap in range(geometry.taps):
            up = phase_h + geometry.padding_h - tap // geometry.kernel_w * geometry.dilation_h
            left = phase_w + geometry.padding_w - tap % geometry.kernel_w * geometry.dilation_w
            # Exact division: the loop is empty where the stride does not divide, so rounding does not matter.
            meets = (up % geometry.stride_h == 0) & (left % geometry.stride_w == 0)
            up, left = up // geometry.stride_h, left // geometry.stride_w
            slopes = ()
            insides = ()
            for piece in tl.static_range(PIECES):
                image, row, column = pixels[piece]
                slopes = slopes + (grad_ptr + _pixel(image, row + up, column + left, grad_strides),)
                insides = insides + (_inside(row + up, column + left, geometry.out_h, geometry.out_w),)
            w_row = w_ptr + ((group.to(tl.int64) * TERMS + term) * geometry.taps + tap) * filters * packed
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
    result_ptr += phase_h.to(tl.int64) * result_strides.h + phase_w.to(tl.int64) * result_strides.w
    offset = (group * channels + channel).to(tl.int64) * result_strides.c
    for piece in tl.static_range(PIECES):
        image, row, column = pixels[piece]
        pixel = _offset(
            image,
            row,
            column,
            result_strides.n,
            result_strides.h * geometry.stride_h,
            result_strides.w * geometry.stride_w,
        )
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
    geometry,
    x_strides,
    grad_strides,
    result_strides,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``input_grad_tiled`` for thin groups, a ``[POSITIONS, WIDTH]`` tile of one phase of the input.

    ``w`` is ``[T, O, C / G, taps]``; ``all_channels`` counts those of all groups.
    """
    program = tl.program_id(0)
    phase_h = tl.program_id(1) // geometry.stride_w
    phase_w = tl.program_id(1) % geometry.stride_w
    position = program // channel_tiles * POSITIONS + tl.arange(0, POSITIONS)
    channel = program % channel_tiles * WIDTH + tl.arange(0, WIDTH)
    kept = channel < all_channels
    image, row, column = _input_pixels(position, geometry, phase_h, phase_w)
    stored = (row >= 0)[:, None] & kept[None, :]
    x_ptr += phase_h.to(tl.int64) * x_strides.h + phase_w.to(tl.int64) * x_strides.w
    x_pixel = _phase_pixel(image, row, column, x_strides, geometry)
    x_pointer = x_ptr + (x_pixel[:, None] + (channel.to(tl.int64) * x_strides.c)[None, :])
    x = tl.load(x_pointer, mask=stored, other=0.0).to(tl.float32)
    group = channel // channels
    first_filter = (group * filters).to(tl.int64)
    first_weight = (first_filter * channels + channel - group * channels) * geometry.taps
    acc = tl.zeros([POSITIONS, WIDTH], tl.float32)
    for term in tl.static_range(TERMS):
        if term > 0:
            acc *= 0.5
        for tap_row in range(geometry.taps // geometry.kernel_w):
            up = phase_h + geometry.padding_h - tap_row * geometry.dilation_h
            for tap_column in range(tl.where(up % geometry.stride_h == 0, geometry.kernel_w, 0)):
                left = phase_w + geometry.padding_w - tap_column * geometry.dilation_w
                g_row, g_column = row + up // geometry.stride_h, column + left // geometry.stride_w
                inside = _inside(g_row, g_column, geometry.out_h, geometry.out_w)
                g_pixel = _pixel(image, g_row, g_column, grad_strides)
                g_pointer = grad_ptr + (g_pixel[:, None] + (first_filter * grad_strides.c)[None, :])
                w_pointer = w_ptr + first_weight + tap_row * geometry.kernel_w + tap_column
                for _ in range(tl.where(left % geometry.stride_w == 0, filters, 0)):
                    slope = tl.load(g_pointer, mask=inside[:, None] & kept[None, :], other=0.0).to(tl.float32)
                    w = tl.load(w_pointer, mask=kept, other=0.0).to(tl.float32)
                    acc += slope * tl.clamp(w[None, :] - x, -1.0, 1.0)
                    g_pointer += grad_strides.c
                    w_pointer += channels * geometry.taps
        w_ptr += (all_channels * filters).to(tl.int64) * geometry.taps
    result_ptr += phase_h.to(tl.int64) * result_strides.h + phase_w.to(tl.int64) * result_strides.w
    pixel = _phase_pixel(image, row, column, result_strides, geometry)
    target = result_ptr + (pixel[:, None] + (channel.to(tl.int64) * result_strides.c)[None, :])
    tl.store(target, tl.where(x == x, acc, x), mask=stored)
