"""Reference implementation of the adder convolution: a direct transcription of the formula, not optimized.

Every other implementation in this package is tested against this one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import pair


class _NegativeDistance(torch.autograd.Function):
    """``-|x - w|`` elementwise, with AdderNet's gradients in place of the signs of the derivative.

    AdderNet (arXiv 1912.13200), section 3.2: the weight gradient is the full-precision ``x - w``, the input
    gradient is ``HardTanh(w - x)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return -(x - w).abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * (w - x).clamp(-1, 1), grad * (x - w)


def adder_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``y[n,o,p] = -Σ_k |x[n,k,p] - w[o,k]| + bias[o]``, k over input channels of the group and kernel taps.

    With T terms a weight, it is the sum of ``2^-j`` times this function of each term's weights. This is
    equation 1 of AdderNet (arXiv 1912.13200), with the gradients of its section 3.2. Padded taps are zeros like any
    other input: each contributes ``-|0 - w|``.

    Args:
        input: ``[N, C, H, W]``, floating point.
        weight: ``[O, C / groups, kh, kw]``, or ``[O, C / groups, T, kh, kw]``, of the input's dtype.
        bias: ``[O]`` or ``None``.
        stride: Step of the window in pixels.
        padding: Zeros on each side in pixels.
        dilation: Distance between taps in pixels.
        groups: Number of channel groups.

    Returns:
        ``[N, O, H', W']`` of the input's dtype.
    """
    if weight.ndim == 5:
        terms = [
            2.0**-index * adder_conv2d_reference(input, term, None, stride, padding, dilation, groups)
            for index, term in enumerate(weight.unbind(2))
        ]
        total = torch.stack(terms).sum(0)
        return total if bias is None else total + bias[:, None, None]
    filters, _, *kernel = weight.shape
    batch, _, height, width = input.shape
    columns = F.unfold(input, tuple(kernel), pair(dilation), pair(padding), pair(stride))
    x = columns.reshape(batch, groups, 1, -1, columns.shape[-1])
    w = weight.reshape(1, groups, filters // groups, -1, 1)
    distance = _NegativeDistance.apply(*torch.broadcast_tensors(x, w))
    spatial = [
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, pad, dil, k, step in zip(
            (height, width), pair(padding), pair(dilation), kernel, pair(stride), strict=True
        )
    ]
    output: Tensor = distance.sum(3).reshape(batch, filters, *spatial)
    return output if bias is None else output + bias[:, None, None]
