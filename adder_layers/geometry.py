"""Geometry of a convolution: window, output size, argument checks, and tiles for blocked loops."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Window arithmetic in 64 bits cannot overflow with settings up to this size.
LARGEST_SETTING = 2**31 - 1
_WHOLE = (int, torch.SymInt)


def pair(value: int | Sequence[int], name: str = "value") -> tuple[int, int]:
    """Return ``(3, 3)`` for ``3``, and a pair as it is.

    Args:
        value: One number or ``(height, width)``.
        name: Name of the argument in errors.

    Raises:
        TypeError: The value does not consist of whole numbers.
        ValueError: A sequence does not have two of them, or one needs more than 31 bits.
    """
    if isinstance(value, _WHOLE):
        value = (value, value)
    elif not isinstance(value, (tuple, list, Sequence)) or not all(isinstance(size, _WHOLE) for size in value):
        raise TypeError(f"{name} is {value!r}, expected one whole number or (height, width)")
    if len(value) != 2:
        raise ValueError(f"{name} is {tuple(value)}, expected one number or (height, width)")
    height, width = value
    if not (-LARGEST_SETTING <= height <= LARGEST_SETTING and -LARGEST_SETTING <= width <= LARGEST_SETTING):
        raise ValueError(f"{name} is {tuple(value)}, expected at most {LARGEST_SETTING} in both directions")
    return height, width


class Window(NamedTuple):
    """Kernel size, stride, zero padding and dilation as ``(height, width)`` pairs, in pixels."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> "Window":
        """Return the window that a weight ``[O, C / groups, kh, kw]`` or ``[O, C / groups, T, kh, kw]`` slides."""
        settings = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"))
        return cls((weight.shape[-2], weight.shape[-1]), *settings)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the output's ``(height, width)`` for an input's, by the formula in ``torch.nn.Conv2d``'s docs."""
        rows, columns = (
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip((height, width), *self, strict=True)
        )
        return rows, columns


POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))  # a single pixel


class Span(NamedTuple):
    """Part of a tile along one axis.

    Args:
        first: First output.
        last: End of the outputs, exclusive.
        start: First input that they read.
        stop: End of the inputs that they read, exclusive.
        before: Number of padding zeros before these inputs.
        after: Number of padding zeros after these inputs.
    """

    first: int
    last: int
    start: int
    stop: int
    before: int
    after: int


class Tile(NamedTuple):
    """Box of output positions: images, rows and columns."""

    images: slice
    rows: Span
    columns: Span


_MIXABLE = (torch.float32, torch.float16, torch.bfloat16)


def _span(window: Window, axis: int, first: int, last: int, size: int) -> Span:
    _, stride, padding, dilation = (value[axis] for value in window)
    begin = first * stride - padding
    end = (last - 1) * stride - padding + (window.kernel[axis] - 1) * dilation + 1
    start, stop = min(max(begin, 0), size), min(max(end, 0), size)
    before = min(max(-begin, 0), end - begin)
    return Span(first, last, start, stop, before, end - begin - before - (stop - start))


def tiles(window: Window, input: Tensor, elements_per_position: int, limit: int) -> Iterator[Tile]:
    """Divide a convolution's output into boxes of at most ``limit`` elements each, but at least one position.

    Args:
        window: The sliding window.
        input: ``[N, C, H, W]``; only its shape is used.
        elements_per_position: Elements of memory for each output position.
        limit: Most elements of memory for one box.

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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Window:
    """Check a convolution's arguments and return its window; errors name the argument, its value and the expectation.

    Args:
        input: Expected to be ``[N, C, H, W]``, floating point.
        weight: Expected to be ``[O, C / groups, kh, kw]`` or ``[O, C / groups, T, kh, kw]``, on the
            input's device and of a dtype that fits the input's.
        bias: Expected to be ``[O]``, with device and dtype as the weight, or ``None``.
        stride: ``(height, width)``, each at least 1.
        padding: ``(height, width)``, each at least 0.
        dilation: ``(height, width)``, each at least 1.
        groups: Expected to divide the filters and the channels.

    Raises:
        TypeError: A dtype is not floating point, or dtypes do not fit each other.
        ValueError: A rank, number of channels, device or setting is not as expected.
    """
    _check_tensors(input, weight, bias)
    window = Window.of(weight, stride, padding, dilation)
    for name, values, least in zip(Window._fields[1:], window[1:], (1, 0, 1), strict=True):
        if values[0] < least or values[1] < least:
            raise ValueError(f"{name} is {values}, expected at least {least} in both directions")
    filters, channels, *_ = weight.shape
    if groups < 1 or filters % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of the {filters} filters of weight")
    if input.shape[1] != channels * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels (shape {tuple(input.shape)}), expected {channels * groups} "
            f"= {channels} of weight {tuple(weight.shape)} x {groups} groups"
        )
    return window


def terms_first(weight: Tensor) -> Tensor:
    """Return a weight as ``[T, O, C / groups, kh, kw]``, a view.

    Args:
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C / groups, T, kh, kw]`` with T terms.
    """
    return weight[None] if weight.ndim == 4 else weight.movedim(2, 0)


def term_factors(terms: int, like: Tensor) -> Tensor:
    """Return the factors of a weight's terms, 1, 1/2, 1/4 and so on, ``[T]``, with dtype and device of a tensor."""
    return 0.5 ** torch.arange(terms, dtype=like.dtype, device=like.device)


def check_output_size(input: Tensor, window: Window) -> None:
    """Check that the kernel fits into the padded input.

    Raises:
        ValueError: The output would be empty.
    """
    if min(window.output_size(input.shape[2], input.shape[3])) < 1:
        raise ValueError(
            f"input of {input.shape[2]}x{input.shape[3]} pixels is smaller than the kernel: expected an output of at "
            f"least 1x1 with kernel {window.kernel}, padding {window.padding}, dilation {window.dilation}"
        )


def check_grad(grad: Tensor, input: Tensor, weight: Tensor, window: Window) -> None:
    """Check the gradient of a convolution's output, whose other arguments have been checked.

    Raises:
        TypeError: Its dtype does not fit the input's.
        ValueError: Its shape or device is not that of the output.
    """
    size = (input.shape[0], weight.shape[0], *window.output_size(input.shape[2], input.shape[3]))
    if tuple(grad.shape) != size:
        raise ValueError(f"grad has shape {tuple(grad.shape)}, expected {size}, like the output")
    _check_place("grad", grad, input)
    check_dtypes(input, grad, None, mixed=True, name="grad")


def check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None, *, mixed: bool, name: str = "weight") -> None:
    """Check that dtypes are floating point and the input's, or with ``mixed`` that fp32 meets half precision only.

    Raises:
        TypeError: They are not; the message says which.
    """
    if input.dtype not in _MIXABLE and input.dtype != torch.float64:
        raise TypeError(f"input has dtype {input.dtype}, expected a floating-point dtype such as {torch.float32}")
    for label, tensor in ((name, weight), ("bias", bias)):
        if tensor is None or tensor.dtype == input.dtype:
            continue
        if not (mixed and tensor.dtype in _MIXABLE and input.dtype in _MIXABLE):
            raise TypeError(f"{label} has dtype {tensor.dtype}, expected {input.dtype}, like input")


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    filters = weight.shape
    if input.ndim != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected [N, C, H, W] or [C, H, W]")
    if len(filters) not in (4, 5) or 0 in filters:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected non-empty [O, C / groups, kh, kw], or "
            "[O, C / groups, T, kh, kw] for T terms a weight"
        )
    check_dtypes(input, weight, bias, mixed=True)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected [{weight.shape[0]}], one value per filter")
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_place(name, tensor, input)


def _check_place(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {input.device}, like input")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}, expected a dense tensor ({torch.strided})")
