"""Where a convolution's windows lie: sizes, the check of arguments, and the tiles a blocked loop walks over."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pair(value: int | Sequence[int], name: str = "value") -> tuple[int, int]:
    """``3`` becomes ``(3, 3)``; a pair stays a pair; ``name`` is what an error calls it."""
    if isinstance(value, int | torch.SymInt):
        return value, value
    if not isinstance(value, Sequence) or not all(isinstance(size, int | torch.SymInt) for size in value):
        raise TypeError(f"{name} is {value!r}, expected one whole number or (height, width)")
    if len(value) != 2:
        raise ValueError(f"{name} is {tuple(value)}, expected one number or (height, width)")
    return value[0], value[1]


class Window(NamedTuple):
    """Kernel size, stride, zero padding and dilation as ``(height, width)`` pairs, in pixels."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> "Window":
        """The window that a ``[O, C, kh, kw]`` weight slides over its input."""
        return cls((weight.shape[2], weight.shape[3]), pair(stride), pair(padding), pair(dilation))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Output ``(height, width)`` for an input of that size; the formula of ``torch.nn.Conv2d``'s docs."""
        rows, columns = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip((height, width), *self, strict=True)
        )
        return rows, columns


POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))  # a single pixel


class Span(NamedTuple):
    """Along one axis: the outputs ``[first, last)``, the inputs ``[start, stop)`` they read, the zeros around."""

    first: int
    last: int
    start: int
    stop: int
    before: int
    after: int


class Tile(NamedTuple):
    """A box of output positions: images, rows and columns."""

    images: slice
    rows: Span
    columns: Span


_MIXABLE = {torch.float32, torch.float16, torch.bfloat16}


def _span(window: Window, axis: int, first: int, last: int, size: int) -> Span:
    _, stride, padding, dilation = (value[axis] for value in window)
    begin = first * stride - padding
    end = (last - 1) * stride - padding + (window.kernel[axis] - 1) * dilation + 1
    start, stop = min(max(begin, 0), size), min(max(end, 0), size)
    before = min(max(-begin, 0), end - begin)
    return Span(first, last, start, stop, before, end - begin - before - (stop - start))


def tiles(window: Window, input: Tensor, elements_per_position: int, limit: int) -> Iterator[Tile]:
    """Cut the output of ``input`` ``[N, C, H, W]`` into boxes of at most ``limit`` elements (never below a position).

    Args:
        window: The sliding window.
        input: The convolution's input; only its shape is used.
        elements_per_position: Elements that a box needs for each of its output positions.
        limit: Elements that a box may need.

    Yields:
        Boxes that cover the output exactly once.
    """
    batch, _, height, width = input.shape
    out_rows, out_columns = window.output_size(height, width)
    positions = max(1, limit // elements_per_position)
    columns = min(out_columns, positions)
    rows = min(out_rows, max(1, positions // out_columns))
    images = max(1, positions // (out_rows * out_columns))
    for image in range(0, batch, images):
        for row in range(0, out_rows, rows):
            for column in range(0, out_columns, columns):
                yield Tile(
                    slice(image, min(image + images, batch)),
                    _span(window, 0, row, min(row + rows, out_rows), height),
                    _span(window, 1, column, min(column + columns, out_columns), width),
                )


def check_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    mixed: bool,
) -> None:
    """Refuse what does not fit together, naming the argument, its value and what was expected.

    Args:
        input: The argument of the convolution, as are those that follow.
        weight: See ``input``.
        bias: See ``input``.
        stride: See ``input``.
        padding: See ``input``.
        dilation: See ``input``.
        groups: See ``input``.
        mixed: Whether half precision and fp32 may meet, as they do under autocast.

    Raises:
        TypeError: A dtype is not floating point, or dtypes differ.
        ValueError: Ranks, channels, devices, window settings or sizes do not fit.
    """
    _check_tensors(input, weight, bias, mixed)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise ValueError(f"{name} is {tuple(values)}, expected at least {least} in both directions")
    filters, channels, *_ = weight.shape
    if groups < 1 or filters % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of the {filters} filters of weight")
    if input.shape[1] != channels * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels (shape {tuple(input.shape)}), expected {channels * groups} "
            f"= {channels} of weight {tuple(weight.shape)} x {groups} groups"
        )


def check_output_size(input: Tensor, window: Window) -> None:
    """Refuse an input that the kernel does not fit into.

    Raises:
        ValueError: The output would be empty.
    """
    if min(window.output_size(input.shape[2], input.shape[3])) < 1:
        raise ValueError(
            f"input of {input.shape[2]}x{input.shape[3]} pixels is smaller than the kernel: expected an output of at "
            f"least 1x1 with kernel {window.kernel}, padding {window.padding}, dilation {window.dilation}"
        )


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, mixed: bool) -> None:
    if input.ndim != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected [N, C, H, W] or [C, H, W]")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected non-empty [O, C / groups, kh, kw]")
    if not input.dtype.is_floating_point:
        raise TypeError(f"input has dtype {input.dtype}, expected a floating-point dtype such as {torch.float32}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}], one value a filter")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != input.dtype and not (mixed and {tensor.dtype, input.dtype} <= _MIXABLE):
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {input.dtype} as input has")
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {input.device} as input is")
