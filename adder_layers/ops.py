"""The adder convolution as torch operators: implementations, gradients, autocast, FLOPs.

``adderkit::adder_conv2d`` and ``adderkit::adder_conv2d_input_grad`` are each implemented for all devices and for shapes
only (fake), so that ``torch.compile``, ``torch.export`` and meta tensors understand them. The weight gradient needs no
operator of its own: it is an ordinary convolution's, less a term per filter.

Operators are called directly, too, by programs from ``torch.export``: both implementations check their arguments.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .backends import choose_backend
from .backends.blocked import compute_dtype
from .geometry import Window, check_arguments, check_grad, check_output_size, term_factors, terms_first

NO_FORWARD_MODE = (
    "adder_conv2d has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): its gradients are AdderNet's "
    "substitutes for the derivative; use reverse mode (torch.func.grad, vjp, jacrev)"
)
NO_SECOND_DERIVATIVE = (
    "adder_conv2d has no second derivative with respect to its input: its gradient is AdderNet's substitute, "
    "HardTanh(w - x); detach that gradient, or compute it without create_graph"
)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return channels-last for a channels-last tensor, as ``conv2d`` does, and contiguous for any other."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    _, channels, height, width = tensor.stride()
    return torch.channels_last if 0 < channels < width < height else torch.contiguous_format


def _check_tangents(*tensors: Tensor) -> None:
    """Refuse tensors with a forward-mode tangent, which operators would drop silently."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
        raise NotImplementedError(NO_FORWARD_MODE)


def _empty_output(input: Tensor, weight: Tensor, window: Window) -> Tensor:
    check_output_size(input, window)
    size = (input.shape[0], weight.shape[0], *window.output_size(input.shape[2], input.shape[3]))
    # Under autocast the input may be half precision where the weight is not; the output then has the weight's dtype.
    dtype = torch.promote_types(input.dtype, weight.dtype)
    return torch.empty(size, dtype=dtype, device=input.device, memory_format=_memory_format(input))


@torch.library.custom_op("adderkit::adder_conv2d", mutates_args=())
def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``y[n,o,p] = -Σ_k |x[n,k,p] - w[o,k]| + bias[o]`` (AdderNet, arXiv 1912.13200, equation 1).

    With several terms a weight, it is ``-Σ_j 2^-j Σ_k |x[n,k,p] - w[j,o,k]| + bias[o]``, summed without further memory.

    Args:
        input: ``[N, C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]`` of the input's dtype, or ``[O, C / groups, T, kh, kw]`` with T terms; fp32
            may meet half precision, as under autocast.
        bias: ``[O]`` of the weight's dtype, or ``None``.
        stride: Step of the window in pixels, ``(height, width)``.
        padding: Zeros on each side in pixels, ``(height, width)``; each padded tap contributes ``-|0 - w|``.
        dilation: Distance between taps in pixels, ``(height, width)``.
        groups: Number of channel groups.

    Returns:
        ``[N, O, H', W']`` of the dtype to which the operands promote, channels-last if the input is. Half precision is
        summed in fp32.

    Raises:
        TypeError: A dtype is not floating point, or dtypes do not fit each other.
        ValueError: A shape, device or setting is not as expected, or ``ADDERKIT_CPU`` names an instruction set that is
            not available.
    """
    _check_tangents(input, weight, *([] if bias is None else [bias]))
    window = check_arguments(input, weight, bias, stride, padding, dilation, groups)
    output = _empty_output(input, weight, window)
    choose_backend(input.device.type, input.dtype).forward(input, terms_first(weight), output, window, groups)
    return output if bias is None else output.add_(bias[:, None, None])


@adder_conv2d.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    window = check_arguments(input, weight, bias, stride, padding, dilation, groups)
    return _empty_output(input, weight, window)


@torch.library.custom_op("adderkit::adder_conv2d_input_grad", mutates_args=())
def adder_conv2d_input_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of the input, ``Σ_j 2^-j Σ_o grad[o] · HardTanh(w[j,o] - x)`` over the windows that contain a pixel.

    AdderNet (arXiv 1912.13200, section 3.2) takes HardTanh in place of the derivative, which is the sign.

    Args:
        grad: Gradient of the output, ``[N, O, H', W']``.
        input: ``[N, C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C / groups, T, kh, kw]`` with T terms.
        stride: Step of the window in pixels, ``(height, width)``.
        padding: Zeros on each side in pixels, ``(height, width)``.
        dilation: Distance between taps in pixels, ``(height, width)``.
        groups: Number of channel groups.

    Returns:
        ``[N, C, H, W]`` of the input's dtype, channels-last if the input is. Half precision is summed in fp32.

    Raises:
        TypeError: A dtype is not floating point, or dtypes do not fit each other.
        ValueError: A shape, device or setting is not as expected, or ``ADDERKIT_CPU`` names an instruction set that is
            not available.
    """
    _check_tangents(grad, input, weight)
    window = check_arguments(input, weight, None, stride, padding, dilation, groups)
    check_grad(grad, input, weight, window)
    dtype, memory_format = compute_dtype(input.dtype), _memory_format(input)
    result = torch.empty_like(input, dtype=dtype, memory_format=memory_format)
    choose_backend(input.device.type, input.dtype).input_grad(grad, input, terms_first(weight), result, window, groups)
    return result.to(input.dtype)


@adder_conv2d_input_grad.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    window = check_arguments(input, weight, None, stride, padding, dilation, groups)
    check_grad(grad, input, weight, window)
    return torch.empty_like(input, memory_format=_memory_format(input))


def adder_conv2d_weight_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient of the weight, ``Σ_p grad[o,p] · (x[k,p] - w[o,k])`` (AdderNet, arXiv 1912.13200, section 3.2).

    Expanded, it is a convolution's weight gradient minus ``w[o,k] · Σ_p grad[o,p]``, so no L1 kernel is needed. Padded
    taps are zeros in the first term and ``-w`` in the second, as the formula requires. All terms of a weight share the
    convolution's gradient; that of term j has the factor ``2^-j``.

    Args:
        grad: Gradient of the output, ``[N, O, H', W']``.
        input: ``[N, C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C / groups, T, kh, kw]`` with T terms.
        stride: Step of the window in pixels, ``(height, width)``.
        padding: Zeros on each side in pixels, ``(height, width)``.
        dilation: Distance between taps in pixels, ``(height, width)``.
        groups: Number of channel groups.

    Returns:
        The gradient in the weight's shape and dtype, summed in fp32 for half precision. On GPUs its products are
        TF32 where torch allows convolutions that, as it does by default.
    """
    dtype = compute_dtype(weight.dtype)
    grad, input, wide = grad.to(dtype), input.to(dtype), weight.to(dtype)
    filters = wide if wide.ndim == 4 else wide[:, :, 0]
    products: Tensor = torch.ops.aten.convolution_backward(
        grad, input, filters, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    totals = grad.sum((0, 2, 3))[:, None, None, None]
    if wide.ndim == 4:
        return (products - wide * totals).to(weight.dtype)
    factors = term_factors(wide.shape[2], wide)
    return ((products[:, :, None] - wide * totals[..., None]) * factors[:, None, None]).to(weight.dtype)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what ``backward`` needs; ``inputs`` are the arguments of ``adder_conv2d``."""
    input, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)


def backward(
    ctx: Any, grad: Tensor, input_grad: Callable[..., Tensor] = adder_conv2d_input_grad
) -> tuple[Tensor | None, ...]:
    """Return a gradient for each argument of ``adder_conv2d``, ``None`` where it is not needed.

    Args:
        ctx: What ``save_for_backward`` has filled.
        grad: Gradient of the output, ``[N, O, H', W']``.
        input_grad: Computes the input's gradient, with the arguments of ``adder_conv2d_input_grad``.
    """
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return (
        input_grad(grad, input, weight, *ctx.geometry) if needs_input else None,
        adder_conv2d_weight_grad(grad, input, weight, *ctx.geometry) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
        *(None for _ in ctx.geometry),
    )


def _refuse_second_derivative(ctx: Any, grad: Tensor) -> NoReturn:
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


adder_conv2d.register_autograd(backward, setup_context=save_for_backward)
adder_conv2d_input_grad.register_autograd(_refuse_second_derivative)


def _to_compute_dtype(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(compute_dtype(tensor.dtype))


def _autocast(device: str) -> Any:
    """Return the operator's autocast rule for a device: weights and output in fp32, the input unchanged.

    An output near -600 has steps of 4 in bfloat16, more than the differences between two images. The input is what is
    kept for the backward pass, so its memory remains that of half precision.
    """
    exclude = torch._C._ExcludeDispatchKeyGuard
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def adder_conv2d_under_autocast(input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        with exclude(keys):
            result: Tensor = adder_conv2d(input, _to_compute_dtype(weight), _to_compute_dtype(bias), *others)
        return result

    return adder_conv2d_under_autocast


_library = torch.library.Library("adderkit", "FRAGMENT")
_library.impl("adder_conv2d", _autocast("CPU"), "AutocastCPU")
_library.impl("adder_conv2d", _autocast("CUDA"), "AutocastCUDA")


@register_flop_formula(torch.ops.adderkit.adder_conv2d)
def _forward_flops(input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Count a subtraction and an addition for each ``|x - w|``, as many as a convolution. Arguments are shapes."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.adderkit.adder_conv2d_input_grad)
def _input_grad_flops(grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * math.prod(weight[1:])
