"""The CPU kernels: fp32 in C++, for the best instruction set that this machine has.

``ADDERKIT_CPU`` forces a lower one (``avx512``, ``avx2``, ``baseline``), or ``torch`` for the path in plain torch,
which also serves where the extension was not built.
"""

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Window

try:
    from .. import _cpu
except ImportError as error:  # not built on this platform
    _cpu = None  # type: ignore[assignment]
    _IMPORT_ERROR = error

VARIABLE = "ADDERKIT_CPU"
_logger = logging.getLogger(__name__)


def available() -> list[str]:
    """Instruction sets that this build has and this machine runs, best first; empty without the extension."""
    return [] if _cpu is None else list(_cpu.available())


def integer_available() -> list[str]:
    """The same for networks in integers, where ``avx512`` is what machines with VNNI have.

    Those with ``_float`` add sums as doubles, with the same result: faster on AMD's CPUs, where they come first.
    """
    return [] if _cpu is None else list(_cpu.integer_available())


def network(
    instruction_set: str, activations: Sequence[tuple[Sequence[int], Sequence[int]]], size: int
) -> "_cpu.Network":
    """An empty executor of quantized networks; ``integer/engine.py`` is its caller."""
    return _cpu.Network(instruction_set, activations, size)


def instruction_set() -> str | None:
    """The instruction set in use, or ``None`` for the path in plain torch.

    Raises:
        ValueError: ``ADDERKIT_CPU`` names one that is not available.
    """
    return choose(tuple(available()), os.environ.get(VARIABLE, ""))


@functools.cache
def choose(names: tuple[str, ...], wanted: str, asked: str = VARIABLE) -> str | None:
    """The one of ``names`` (best first) to use; ``None`` for ``"torch"``, or where the extension was not built.

    Args:
        names: What is available.
        wanted: The user's wish; empty for the best.
        asked: What the wish came by, for the error.

    Raises:
        ValueError: ``wanted`` is not available.
    """
    if wanted == "torch":
        return None
    if wanted and wanted not in names:
        raise ValueError(f"{asked} is {wanted!r}, expected one of {', '.join([*names, 'torch'])}")
    if not names:
        _logger.warning(
            "adderkit's CPU extension is missing (%s); the paths in plain torch serve, ten times slower and more. "
            "Install adderkit where a C++ compiler with OpenMP is at hand.",
            _IMPORT_ERROR,
        )
        return None
    return wanted or names[0]


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``output`` with ``-Σ|x - w|``; ``Backend.forward`` describes the arguments."""
    wide, kernel = input.float(), weight.float().contiguous()
    result = output if output.dtype == torch.float32 else torch.empty_like(output, dtype=torch.float32)
    sizes = _sizes(wide, kernel, result, window, groups)
    threads = torch.get_num_threads()
    _cpu.forward(_required(), sizes, wide.data_ptr(), kernel.data_ptr(), result.data_ptr(), threads)
    if result is not output:
        output.copy_(result)


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``result`` with ``Σ_o grad[o] · HardTanh(w - x)``; ``Backend.input_grad`` describes the arguments."""
    result.zero_()  # the kernel leaves pixels that no window reads as they are
    # The kernel reads input and result through one set of strides.
    wide = torch.empty_like(result).copy_(input) if input.stride() != result.stride() else input.float()
    slopes, kernel = grad.float(), weight.float().contiguous()
    sizes = _sizes(wide, kernel, slopes, window, groups)
    _cpu.input_grad(
        _required(),
        sizes,
        slopes.data_ptr(),
        wide.data_ptr(),
        kernel.data_ptr(),
        result.data_ptr(),
        torch.get_num_threads(),
    )


def _required() -> str:
    name = instruction_set()
    assert name is not None
    return name


def _sizes(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> list[int]:
    """Sizes and strides in the order in which ``Problem`` (csrc/planes.h) declares them."""
    return [
        *input.shape,
        weight.shape[0],
        *window.kernel,
        *output.shape[2:],
        *window.stride,
        *window.padding,
        *window.dilation,
        groups,
        *input.stride(),
        *output.stride(),
    ]
