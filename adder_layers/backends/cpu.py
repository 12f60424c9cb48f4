"""The CPU backend: fp32 kernels in C++ for the best instruction set that this machine runs.

``ADDERKIT_CPU`` forces a lower one (``avx512``, ``avx2``, ``baseline``), or ``torch`` for the backend in plain torch,
which also serves where the extension was not built, and where operands are not finite
or so large that sums might overflow.
"""

import functools
import logging
import os

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but not in __all__

from ..geometry import Window
from . import blocked

try:
    from .. import _cpu
except ImportError as error:  # not built on this platform
    _cpu = None  # type: ignore[assignment]
    _IMPORT_ERROR = error

VARIABLE = "ADDERKIT_CPU"
_logger = logging.getLogger(__name__)


def available() -> list[str]:
    """Return the instruction sets that this build has and this machine runs, best first; none without the extension."""
    return [] if _cpu is None else list(_cpu.available())


def integer_available() -> list[str]:
    """Return the same for quantized networks, where ``avx512`` includes VNNI.

    Sets with ``_float`` add sums as doubles, with the same result. That is faster on AMD's CPUs, where they come first.
    """
    return [] if _cpu is None else list(_cpu.integer_available())


def instruction_set() -> str | None:
    """Return the instruction set in use, or ``None`` for plain torch.

    Raises:
        ValueError: ``ADDERKIT_CPU`` names one that is not available.
    """
    return choose(tuple(available()), os.environ.get(VARIABLE, ""))


@functools.cache
def choose(names: tuple[str, ...], wanted: str, asked: str = VARIABLE) -> str | None:
    """Choose one of ``names`` (best first); ``None`` for ``"torch"``, or where the extension was not built.

    Args:
        names: Available instruction sets.
        wanted: The user's choice; empty for the best.
        asked: Name of the variable or argument with the user's choice, for the error.

    Raises:
        ValueError: ``wanted`` is not available.
    """
    if wanted == "torch":
        return None
    if wanted and wanted not in names:
        raise ValueError(f"{asked} is {wanted!r}, expected one of {', '.join([*names, 'torch'])}")
    if not names:
        _logger.warning(
            "adderkit's CPU extension is missing (%s); plain torch is used instead, at least ten times slower. "
            "Reinstall adderkit with a C++ compiler that supports OpenMP.",
            _IMPORT_ERROR,
        )
        return None
    return wanted or names[0]


def forward(input: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``output`` with ``-Σ_j 2^-j Σ|x - w[j]|``; ``Backend.forward`` describes the arguments."""
    wide, kernel = input.float(), weight.float().contiguous()
    result = output if output.dtype == torch.float32 else torch.empty_like(output, dtype=torch.float32)
    # A tenth of the time that nanobind would take for a tensor's capsule, and parameters need not be detached.
    moderate = _cpu.forward(
        _required(),
        to_dlpack(wide),
        to_dlpack(kernel),
        to_dlpack(result),
        stride=window.stride,
        padding=window.padding,
        dilation=window.dilation,
        groups=groups,
        threads=torch.get_num_threads(),
    )
    if not moderate:
        blocked.forward(input, weight, output, window, groups)
    elif result is not output:
        output.copy_(result)


def input_grad(grad: Tensor, input: Tensor, weight: Tensor, result: Tensor, window: Window, groups: int) -> None:
    """Overwrite ``result`` with the input's gradient; ``Backend.input_grad`` describes formula and arguments."""
    result.zero_()  # the kernel leaves pixels that no window reads as they are
    # The kernel reads input and result through one set of strides.
    wide = torch.empty_like(result).copy_(input) if input.stride() != result.stride() else input.float()
    moderate = _cpu.input_grad(
        _required(),
        to_dlpack(grad.float()),
        to_dlpack(wide),
        to_dlpack(weight.float().contiguous()),
        to_dlpack(result),
        stride=window.stride,
        padding=window.padding,
        dilation=window.dilation,
        groups=groups,
        threads=torch.get_num_threads(),
    )
    if not moderate:
        blocked.input_grad(grad, input, weight, result, window, groups)


def _required() -> str:
    name = instruction_set()
    assert name is not None
    return name
