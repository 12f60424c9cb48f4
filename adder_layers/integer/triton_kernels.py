"""Triton kernels of quantized adder layers: bytes in, sums in int32, requantized bytes out, all in one pass.

Tiles and layouts are those of ``forward_kernels.py``. The tiled kernel reads words of four bytes, four neighboring
channels of a pixel, and one instruction (``VABSDIFF4.U8.ACC``) takes four distances and adds them to the sum. It exists
for unsigned bytes only; its signed form is emulated in about thirty. The address of a padded tap is that of a row of
``zero_point`` bytes, so that the hot loop has no mask. The direct kernel is for depthwise and thin groups, whose
channels do not fill words; it reads byte by byte. Between the terms of a weight, sums are doubled.
"""

# Triton's language differs from Python: arguments have no types that a checker could use, constants are in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

from ..backends.triton.forward_kernels import _corner, _inside, _offset, _tile


@triton.jit
def _byte_difference(x, w, place: tl.constexpr):
    return tl.abs(((x >> place) & 255) - ((w >> place) & 255))


@triton.jit
def _add_distance(x, w, acc, INSTRUCTION: tl.constexpr):
    """Return ``acc + Σ|x_i - w_i|`` over the four bytes of each word; without ``INSTRUCTION`` in plain operations."""
    if INSTRUCTION:  # a constant: the other branch is not compiled
        assembly: tl.constexpr = "vabsdiff4.u32.u32.u32.add $0, $1, $2, $3;"
        result = tl.inline_asm_elementwise(assembly, "=r,r,r,r", [x, w, acc], tl.int32, is_pure=True, pack=1)
    else:
        low = _byte_difference(x, w, 0) + _byte_difference(x, w, 8)
        result = acc + low + _byte_difference(x, w, 16) + _byte_difference(x, w, 24)
    return result


@triton.jit
def _store_codes(sums, target, residual, kept, factors, offset, width, quant_max, RESIDUAL: tl.constexpr):
    """Requantize by the formula of ``plan.py`` and store.

    All arguments except ``width`` and ``quant_max`` are pointers to, or values of, the elements. The factors are rows
    of ``width``: multiplier, shift, scale_exponent and the multiplier of the residual.
    """
    total = sums.to(tl.int64) * tl.load(factors, mask=True, other=0).to(tl.int64)
    total += tl.load(offset, mask=True, other=0)
    if RESIDUAL:
        added = tl.load(residual, mask=kept, other=0).to(tl.int64)
        total += added * tl.load(factors + 3 * width, mask=True, other=0).to(tl.int64)
    shift = tl.load(factors + width, mask=True, other=0).to(tl.int64)
    scale_exponent = tl.load(factors + 2 * width, mask=True, other=0)
    codes = tl.minimum(tl.maximum(total, 0) >> shift, quant_max).to(tl.int32) << scale_exponent
    tl.store(target, codes.to(tl.uint8), mask=kept)


@triton.jit
def _dense_pixel(image, row, column, geometry):
    """Return the number of pixels before others in a contiguous channels-last input."""
    return _offset(image, row, column, geometry.height * geometry.width, geometry.width, 1)


@triton.jit
def integer_tiled(
    x_ptr,
    zero_point_ptr,
    w_ptr,
    y_ptr,
    residual_ptr,
    factors_ptr,
    offset_ptr,
    words,
    filters,
    filter_tiles,
    groups,
    geometry,
    quant_max,
    RESIDUAL: tl.constexpr,
    TERMS: tl.constexpr,
    INSTRUCTION: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PIECES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute ``a[o] = Σ|q - w[o]|`` over each window and requantize it (``plan.Adder``).

    ``x`` is ``[N, H, W, G, words]`` and ``zero_point`` ``[G, words]``, both int32 words of four bytes; ``w`` is packed
    ``[G, T, taps, words, width]``; ``y`` and ``residual`` are ``[N, H', W', O]`` uint8. ``filters`` and ``words`` are
    those of a group. A program computes ``PIECES x ROWS`` positions by ``OUTER x LANES`` filters.
    """
    FILTERS: tl.constexpr = OUTER * LANES
    group, position, filter = _tile(filter_tiles, groups, OUTER, ROWS, LANES, PIECES)
    x_ptr += group * words
    zero_point_ptr += group * words
    w_row = w_ptr + group.to(tl.int64) * TERMS * geometry.taps * words * (filter_tiles * FILTERS)
    pixel_words = groups * words
    corners = ()
    accs = ()
    for piece in tl.static_range(PIECES):
        place = position + piece * ROWS
        corners = corners + (_corner(place, geometry),)
        accs = accs + (tl.zeros([OUTER, ROWS, LANES], tl.int32),)
    for term in tl.static_range(TERMS):
        if term > 0:
            doubled = ()
            for piece in tl.static_range(PIECES):
                doubled = doubled + (accs[piece] * 2,)
            accs = doubled
        for tap in range(geometry.taps):
            down = tap // geometry.kernel_w * geometry.dilation_h - geometry.padding_h
            right = tap % geometry.kernel_w * geometry.dilation_w - geometry.padding_w
            pixels = ()
            for piece in tl.static_range(PIECES):
                image, row, column = corners[piece]
                pixel = _dense_pixel(image, row + down, column + right, geometry) * pixel_words
                inside = _inside(row + down, column + right, geometry.height, geometry.width)
                pixels = pixels + (tl.where(inside, x_ptr + pixel, zero_point_ptr),)
            for _ in tl.range(0, words, loop_unroll_factor=UNROLL):
                w = tl.load(w_row + filter, mask=True, other=0)  # [OUTER, 1, LANES], padded to whole tiles
                sums = ()
                following = ()
                for piece in tl.static_range(PIECES):
                    x = tl.load(pixels[piece], mask=True, other=0)
                    sums = sums + (_add_distance(tl.reshape(x, [1, ROWS, LANES]), w, accs[piece], INSTRUCTION),)
                    following = following + (pixels[piece] + 1,)
                accs = sums
                pixels = following
                w_row += filter_tiles * FILTERS
    all_filters = groups * filters
    packed = groups * filter_tiles * FILTERS
    factor = group * filter_tiles * FILTERS + filter
    for piece in tl.static_range(PIECES):
        place = tl.reshape(position + piece * ROWS, [1, ROWS, LANES])
        element = place.to(tl.int64) * all_filters + (group * filters + filter)
        kept = (place < geometry.positions) & (filter < filters)
        _store_codes(
            accs[piece],
            y_ptr + element,
            residual_ptr + element,
            kept,
            factors_ptr + factor,
            offset_ptr + factor,
            packed,
            quant_max,
            RESIDUAL,
        )


@triton.jit
def integer_direct(
    x_ptr,
    zero_point_ptr,
    w_ptr,
    y_ptr,
    residual_ptr,
    factors_ptr,
    offset_ptr,
    channels,
    filters,
    filter_tiles,
    groups,
    geometry,
    quant_max,
    RESIDUAL: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute what ``integer_tiled`` does for thin groups: each element of the tile reads its own operands.

    ``x`` is ``[N, H, W, C]`` and ``zero_point`` ``[C]`` in bytes, ``w`` is ``[T, taps, C / G, O]``; ``filters`` and
    ``channels`` are those of a group. A program computes a tile ``[POSITIONS, WIDTH]`` of positions by filters.
    """
    program = tl.program_id(0)
    position = program // filter_tiles * POSITIONS + tl.arange(0, POSITIONS)
    filter = program % filter_tiles * WIDTH + tl.arange(0, WIDTH)[None, :]
    exists = filter < groups * filters
    image, row, column = _corner(position, geometry)
    first_channel = filter // filters * channels
    acc = tl.zeros([POSITIONS, WIDTH], tl.int32)
    w_pointer = w_ptr + filter
    for term in tl.static_range(TERMS):
        if term > 0:
            acc *= 2
        for tap_row in range(geometry.taps // geometry.kernel_w):
            down = tap_row * geometry.dilation_h - geometry.padding_h
            for tap_column in range(geometry.kernel_w):
                right = tap_column * geometry.dilation_w - geometry.padding_w
                pixel = _dense_pixel(image, row + down, column + right, geometry) * (groups * channels)
                inside = _inside(row + down, column + right, geometry.height, geometry.width)
                pointer = tl.where(inside, x_ptr + pixel, zero_point_ptr)[:, None] + first_channel
                for _ in range(channels):
                    x = tl.load(pointer, mask=exists, other=0).to(tl.int32)
                    w = tl.load(w_pointer, mask=exists, other=0).to(tl.int32)
                    acc += tl.abs(x - w)
                    pointer += 1
                    w_pointer += groups * filters
    element = position.to(tl.int64)[:, None] * (groups * filters) + filter
    kept = (position < geometry.positions)[:, None] & exists
    _store_codes(
        acc,
        y_ptr + element,
        residual_ptr + element,
        kept,
        factors_ptr + filter,
        offset_ptr + filter,
        filter_tiles * WIDTH,
        quant_max,
        RESIDUAL,
    )
