"""The adder convolution as a torch operator, a function and a module.

Two operators, ``adderkit::adder_conv2d`` and ``adderkit::adder_conv2d_input_grad``, each implemented by device and for
shapes only (fake), so that ``torch.compile``, ``torch.export`` and meta tensors understand them. The weight gradient
needs no operator of its own: it is an ordinary convolution's, less a term per filter.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from .backends import blocked, cpu
from .backends.triton import launch as gpu
from .geometry import Window, check_arguments, check_output_size, pair


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels-last in, channels-last out, as ``conv2d`` does; anything else comes out contiguous."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    _, channels, height, width = tensor.stride()
    return torch.channels_last if 0 < channels < width < height else torch.contiguous_format


def _empty_output(input: Tensor, weight: Tensor, window: Window) -> Tensor:
    size = (input.shape[0], weight.shape[0], *window.output_size(input.shape[2], input.shape[3]))
    # Under autocast the input may be half precision where the weight is not; the output is what the weight is then.
    dtype = torch.promote_types(input.dtype, weight.dtype)
    return torch.empty(size, dtype=dtype, device=input.device, memory_format=_memory_format(input))


def _on_cpu(dtype: torch.dtype) -> ModuleType:
    """C++ where it was built, else plain torch."""
    return blocked if dtype == torch.float64 or cpu.instruction_set() is None else cpu


def _on_cuda(dtype: torch.dtype) -> ModuleType:
    """Triton where it is installed (ROCm's devices are called cuda too), else plain torch."""
    return gpu if dtype != torch.float64 and gpu.available() else blocked


@torch.library.custom_op("adderkit::adder_conv2d", mutates_args=())
def _adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _forward(blocked, input, weight, bias, stride, padding, dilation, groups)


def _forward(path: ModuleType, input: Tensor, weight: Tensor, bias: Tensor | None, *window_and_groups: Any) -> Tensor:
    *sizes, groups = window_and_groups
    window = Window.of(weight, *sizes)
    output = _empty_output(input, weight, window)
    path.forward(input, weight, output, window, groups)
    return output if bias is None else output.add_(bias[:, None, None])


_adder_conv2d.register_kernel("cpu")(lambda input, *others: _forward(_on_cpu(input.dtype), input, *others))
_adder_conv2d.register_kernel("cuda")(lambda input, *others: _forward(_on_cuda(input.dtype), input, *others))


@_adder_conv2d.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _empty_output(input, weight, Window.of(weight, stride, padding, dilation))


@torch.library.custom_op("adderkit::adder_conv2d_input_grad", mutates_args=())
def _adder_conv2d_input_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _input_grad(blocked, grad, input, weight, stride, padding, dilation, groups)


def _input_grad(path: ModuleType, grad: Tensor, input: Tensor, weight: Tensor, *window_and_groups: Any) -> Tensor:
    *sizes, groups = window_and_groups
    dtype = blocked.compute_dtype(input.dtype)
    result = torch.empty_like(input, dtype=dtype, memory_format=_memory_format(input)).zero_()
    path.input_grad(grad, input, weight, result, Window.of(weight, *sizes), groups)
    return result.to(input.dtype)


_adder_conv2d_input_grad.register_kernel("cpu")(
    lambda grad, input, *others: _input_grad(_on_cpu(input.dtype), grad, input, *others)
)
_adder_conv2d_input_grad.register_kernel("cuda")(
    lambda grad, input, *others: _input_grad(_on_cuda(input.dtype), grad, input, *others)
)


@_adder_conv2d_input_grad.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.empty_like(input, memory_format=_memory_format(input))


def weight_grad(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``Σ_p grad[o,p] · (x[k,p] - w[o,k])`` = a convolution's weight gradient minus ``w[o,k] · Σ_p grad[o,p]``.

    Expanding the full-precision gradient of AdderNet (arXiv 1912.13200, section 3.2) shows that no L1 kernel is
    needed. Padded taps are zeros in the first term and ``-w`` in the second, as they must be.

    Args:
        grad: Gradient of the output, ``[N, O, H', W']``.
        input: ``[N, C, H, W]``.
        weight: ``[O, C / groups, kh, kw]``.
        stride: ``(height, width)`` in pixels; ``padding`` and ``dilation`` likewise.
        padding: See ``stride``.
        dilation: See ``stride``.
        groups: Number of channel groups.

    Returns:
        Gradient of ``weight``, of its shape and dtype, summed in fp32 for half-precision tensors. On GPUs its products
        are TF32 where torch allows convolutions that, as it does by default.
    """
    dtype = blocked.compute_dtype(weight.dtype)
    grad, input, wide = grad.to(dtype), input.to(dtype), weight.to(dtype)
    products: Tensor = torch.ops.aten.convolution_backward(
        grad, input, wide, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return (products - wide * grad.sum((0, 2, 3))[:, None, None, None]).to(weight.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return (
        _adder_conv2d_input_grad(grad, input, weight, *ctx.geometry) if needs_input else None,
        weight_grad(grad, input, weight, *ctx.geometry) if needs_weight else None,
        grad.sum((0, 2, 3)) if needs_bias else None,
        *(None for _ in ctx.geometry),
    )


_adder_conv2d.register_autograd(_backward, setup_context=_save_for_backward)


def _widened(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(blocked.compute_dtype(tensor.dtype))


def _autocast(device: str) -> Any:
    """The operator's rule under autocast: weights and output in fp32, the input as it comes.

    An output near -600 has steps of 4 in bfloat16, which would drown what tells two images apart. What is kept for the
    backward pass is the input, so its memory stays that of half precision.
    """
    exclude = torch._C._ExcludeDispatchKeyGuard
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def adder_conv2d_under_autocast(input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
        with exclude(keys):
            result: Tensor = _adder_conv2d(input, _widened(weight), _widened(bias), *others)
        return result

    return adder_conv2d_under_autocast


_library = torch.library.Library("adderkit", "FRAGMENT")
_library.impl("adder_conv2d", _autocast("CPU"), "AutocastCPU")
_library.impl("adder_conv2d", _autocast("CUDA"), "AutocastCUDA")


@register_flop_formula(torch.ops.adderkit.adder_conv2d)
def _forward_flops(input: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """A term is a subtraction and an addition, as a convolution's is a multiplication and an addition; shapes only."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.adderkit.adder_conv2d_input_grad)
def _input_grad_flops(grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * math.prod(weight[1:])


def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Adder convolution: ``y = -Σ|x - w| + bias`` over each window; the arguments of ``F.conv2d``.

    Padded taps count: each contributes ``-|0 - w|``. The gradients are AdderNet's (arXiv 1912.13200, section 3.2), not
    the derivative's: ``x - w`` for the weight and ``HardTanh(w - x)`` for the input. Half-precision operands are summed
    in fp32; under autocast the output is fp32 too, whatever the input.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]``, of the input's dtype and device.
        bias: ``[O]`` or ``None``.
        stride: Step of the window in pixels, one number or ``(height, width)``.
        padding: Zeros on each side in pixels, or ``"valid"`` (none), or ``"same"`` (stride 1: output like input).
        dilation: Distance between taps in pixels.
        groups: Number of channel groups; ``groups == C`` is a depthwise layer.

    Returns:
        ``[N, O, H', W']`` (or ``[O, H', W']``), channels-last if the input is.

    Raises:
        TypeError: A dtype is not floating point, or dtypes differ.
        ValueError: Shapes, devices or settings do not fit; the message names the argument, its value, the expected.
    """
    if input.ndim == 3:
        return adder_conv2d(input[None], weight, bias, stride, padding, dilation, groups)[0]
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    named = padding if isinstance(padding, str) else ""
    padding = (0, 0) if isinstance(padding, str) else pair(padding, "padding")
    check_arguments(input, weight, bias, stride, padding, dilation, groups, mixed=autocast)
    if named:
        input, padding = _resolve_named_padding(input, weight, named, stride, dilation)
    check_output_size(input, Window.of(weight, stride, padding, dilation))
    result: Tensor = _adder_conv2d(input, weight, bias, stride, padding, dilation, groups)
    return result


def _resolve_named_padding(
    input: Tensor, weight: Tensor, padding: str, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """``"same"`` and ``"valid"`` as numbers; an uneven total is padded here, the extra zero below and to the right."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise ValueError(f"padding is {padding!r}, expected 'same', 'valid' or numbers")
    if stride != (1, 1):
        raise ValueError(f"stride is {stride}, expected 1 with padding='same'")
    height, width = (dil * (k - 1) for dil, k in zip(dilation, weight.shape[2:], strict=True))
    if height % 2 or width % 2:
        input = F.pad(input, (width // 2, width - width // 2, height // 2, height - height // 2))
        return input, (0, 0)
    return input, (height // 2, width // 2)


class AdderConv2d(nn.Conv2d):
    """A ``Conv2d`` that answers with the negative L1 distance of window and filter instead of their dot product.

    Takes every argument of ``torch.nn.Conv2d`` and has the same parameters and state-dict keys, so a convolution's
    weights load as they are and tools that look for ``Conv2d`` by ``isinstance`` see one. Its output is never
    positive (without a bias) and large, so a normalization must follow. ``x`` and ``w`` are ``[N, C, H, W]`` and
    ``[O, C / groups, kh, kw]``.

    Fresh weights are drawn from N(0, 1), as the authors of AdderNet do (arXiv 1912.13200; their code).

    In training, ``sharpness`` turns the input's gradient from AdderNet's ``HardTanh(w - x)`` (1, the default) into
    ``HardTanh(sharpness · (w - x))``, which for large values is the true derivative, the sign. The output is the same
    to the bit for powers of two. It is a setting of the training, not of the model, and is not saved.
    """

    sharpness: float = 1.0

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1); the bias starts at zero."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.training and self.sharpness != 1:
            # |s·x - s·w| / s is |x - w|, and its input gradient HardTanh(s·w - s·x). The weight's comes out s times as
            # large, which the adaptive rate does not see. float16 has no room for scaled values: they are fp32.
            scaled, filters = (
                (tensor.float() if tensor.dtype == torch.float16 else tensor) * self.sharpness
                for tensor in (input, weight)
            )
            output = self._distance(scaled, filters, None) / self.sharpness
            output = output.to(torch.promote_types(input.dtype, weight.dtype))
            return output if bias is None else output + bias[:, None, None]
        return self._distance(input, weight, bias)

    def _distance(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return adder_conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return adder_conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
