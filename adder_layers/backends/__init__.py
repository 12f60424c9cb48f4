"""Backends of the adder convolution: plain torch in blocks, C++ for CPUs, Triton for GPUs; choice by device."""

from typing import Protocol

import torch
from torch import Tensor

from ..geometry import Window
from . import blocked, cpu
from .triton import launch


class Backend(Protocol):
    """One implementation of the adder convolution. A module with these two functions is one.

    Tensors are floating point, on one device, and may have any strides. ``input`` and ``weight`` have one dtype, except
    under autocast, where fp32 may meet half precision. Half precision is summed in fp32. Arguments have been checked.
    The weight's terms come first, ``[T, O, C / groups, kh, kw]``; an AdderNet has one.
    """

    def forward(self, input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
        """Overwrite ``output`` with ``-Σ_j 2^-j Σ|x - w[j]|``, without a bias.

        Args:
            input: ``[N, C, H, W]``.
            weight: ``[T, O, C / groups, kh, kw]``.
            output: ``[N, O, H', W']`` of the dtype to which the operands promote; its content on entry is ignored.
            window: The sliding window.
            groups: Number of channel groups.
        """

    def input_grad(
        self, grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int
    ) -> None:
        """Overwrite ``result`` with ``Σ_j 2^-j Σ_o grad[o] · HardTanh(w[j] - x)``.

        For a single term, this is AdderNet's gradient (arXiv 1912.13200, section 3.2).

        Args:
            grad: Gradient of the output, ``[N, O, H', W']``.
            input: ``[N, C, H, W]``.
            weight: ``[T, O, C / groups, kh, kw]``.
            result: ``[N, C, H, W]`` of ``blocked.compute_dtype(input.dtype)``; its content on entry is ignored, and
                pixels that no window reads become 0.
            window: The sliding window.
            groups: Number of channel groups.
        """


def choose_backend(device: str, dtype: torch.dtype) -> Backend:
    """Return the fastest backend for a device type and the dtype of the input.

    That is Triton for ``"cuda"`` (ROCm's devices have that name too) and C++ for ``"cpu"``. Plain torch serves fp64,
    other devices, and installations without Triton or the C++ extension.

    Raises:
        ValueError: ``ADDERKIT_CPU`` names an instruction set that is not available.
    """
    if dtype == torch.float64:
        return blocked
    if device == "cuda" and launch.available():
        return launch
    if device == "cpu" and cpu.instruction_set() is not None:
        return cpu
    return blocked
