"""Plan of a quantized network: what each step reads, computes and writes, in integers only.

An activation is bytes ``[H, W, C]``. A byte ``q`` of channel ``c`` stands for the real value
``scale · (q - zero_point[c])``, and a padded tap is the byte ``zero_point[c]``. The weights of an adder layer are bytes
on the grid of its input, since only a common step size gives ``|s·q - s·w| = s·|q - w|`` (arXiv 2101.10015; literature
of shared scales).

Every step ends in the same requantization of its sum ``a`` to a byte of channel ``c``:

    t = a · multiplier[c] + r · residual_multiplier[c] + offset[c]          (int64; r is the residual's byte)
    q = min(max(t, 0) >> shift[c], quant_max) << scale_exponent[c]

``offset`` holds the rounding half, the zero points, the BatchNorm shift and the constants of clamped weights; ReLU is
the ``max`` with a zero point of 0. With fewer than 8 bits, ``quant_max`` is ``2^bits - 1`` and ``scale_exponent`` gives
each group of channels its own step size, a power of two times the finest one. Codes are stored already shifted, so that
kernels that read bytes need not know about groups.

A plan is data: ``reference.py`` defines what it computes, ``cpu_engine.py`` and ``cuda_engine.py`` compute it fast.
Functions that depend on the kind of a step match on it and end in ``assert_never``, so that the type checker lists all
of them once a kind is added to ``Step``.
"""

import dataclasses
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..geometry import Window


@dataclasses.dataclass(frozen=True)
class Activation:
    """Bytes that one step writes and others read.

    Args:
        channels: Number of channels.
        height: Rows in pixels.
        width: Columns in pixels.
        scale: Real value of one unit of the byte.
        zero_point: The byte that stands for 0, ``[C]`` uint8.
    """

    channels: int
    height: int
    width: int
    scale: float
    zero_point: Tensor


@dataclasses.dataclass(frozen=True)
class Requantization:
    """Conversion of a step's sums to the bytes it writes, by the formula above.

    Args:
        multiplier: ``[O]`` int32, of either sign.
        offset: ``[O]`` int64.
        shift: ``[O]`` uint8, at most 62.
        scale_exponent: ``[O]`` uint8; ``quant_max << scale_exponent`` is at most 255.
        quant_max: Largest code, ``2^bits - 1``.
        residual: Number of the activation that is added, which has the output's shape; ``None`` without a residual.
        residual_multiplier: ``[O]`` int32; ``None`` without a residual.
    """

    multiplier: Tensor
    offset: Tensor
    shift: Tensor
    scale_exponent: Tensor
    quant_max: int = 255
    residual: int | None = None
    residual_multiplier: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Filters:
    """Base of adder layers and convolutions: filters over windows of bytes, whose padded taps are the zero point.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        weight: ``[O, kh, kw, C / groups]`` of ``weight_dtype``; with T > 1 terms ``[O, T, kh, kw, C / groups]``.
        window: Kernel, stride, padding and dilation.
        groups: Number of channel groups.
        requantization: Conversion of the sums to bytes.
    """

    kind: ClassVar[str]
    weight_dtype: ClassVar[torch.dtype]

    input: int
    output: int
    weight: Tensor
    window: Window
    groups: int
    requantization: Requantization

    @property
    def terms(self) -> int:
        """Number of terms of each weight."""
        return self.weight.shape[1] if self.weight.ndim == 5 else 1


class Adder(Filters):
    """Adder layer: ``a[o] = Σ|q - w[o]|`` over a window of bytes; the weight is uint8.

    With T terms a weight, ``a[o] = Σ_j 2^(T-1-j) Σ|q - w[o,j]|``, which is 2^(T-1) times the layer's sum. Term by term,
    ``a`` is doubled and the next sum added.
    """

    kind = "adder"
    weight_dtype = torch.uint8


class Convolution(Filters):
    """Convolution: ``a[o] = Σ q·w[o]``, for the first layer and layers that were not converted; the weight is int8.

    The contribution ``-zero_point·Σw`` of the zero point is part of the offset. This is exact because padded taps are
    the zero point as well.
    """

    kind = "convolution"
    weight_dtype = torch.int8


@dataclasses.dataclass(frozen=True)
class Rescale:
    """Element-wise step whose ``a`` is the byte itself: a residual sum, BatchNorm or activation without a layer.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes, of the input's shape.
        requantization: Conversion of bytes to bytes, with or without a residual.
    """

    kind: ClassVar[str] = "rescale"

    input: int
    output: int
    requantization: Requantization


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """Largest byte of each window, ignoring padded taps. Codes keep their meaning, so nothing is requantized.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes, with the input's scale and zero point; its size may be rounded up.
        window: Kernel, stride, padding and dilation.
    """

    kind: ClassVar[str] = "max_pool"

    input: int
    output: int
    window: Window


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """Average of each window: ``a`` is the sum of its bytes, the requantization divides. Windows have no padding.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        window: Kernel and stride; the padding is 0 and the dilation 1.
        requantization: Conversion of the sums to bytes.
    """

    kind: ClassVar[str] = "average_pool"

    input: int
    output: int
    window: Window
    requantization: Requantization


@dataclasses.dataclass(frozen=True)
class Linear:
    """The classifier: ``logit[o] = (Σ q·w[o] · multiplier[o] + offset[o]) >> shift[o]``, int32.

    Args:
        input: Number of the activation it reads; the sum is over all of its bytes, usually those of one pixel.
        weight: ``[O, H · W · C]`` int8, in the order of the bytes.
        multiplier: ``[O]`` int32.
        offset: ``[O]`` int64; bias, rounding half and zero points.
        shift: ``[O]`` uint8, at most 62.
        scale: Real value of one unit of a logit.
    """

    kind: ClassVar[str] = "linear"

    input: int
    weight: Tensor
    multiplier: Tensor
    offset: Tensor
    shift: Tensor
    scale: float


Step: TypeAlias = Adder | Convolution | Rescale | MaxPool | AveragePool | Linear


@dataclasses.dataclass(frozen=True)
class IntegerPlan:
    """An integer network for images of one size.

    Args:
        activations: All activations; number 0 is the image, and what the last step writes is the network's output
            (unless that step is ``Linear``, which returns logits).
        steps: The steps in order; each reads what an earlier one wrote, and each activation is written once.
        paths: Path in the original model of the layer that each step was made from, for reports.
    """

    activations: tuple[Activation, ...]
    steps: tuple[Step, ...]
    paths: tuple[str, ...]

    @property
    def ends_in_logits(self) -> bool:
        """Whether the last step is the classifier, and the output int32 ``[N, classes]``."""
        return isinstance(self.steps[-1], Linear)


def requantization_of(step: Step) -> Requantization | None:
    """Return how a step writes bytes; ``None`` for max-pooling and the classifier, which do not requantize."""
    match step:
        case Adder() | Convolution() | Rescale() | AveragePool():
            return step.requantization
        case MaxPool() | Linear():
            return None
        case _:
            assert_never(step)


def step_tensors(step: Step) -> dict[str, Tensor]:
    """Return the weight and the factors that a step has, by the names of their fields."""
    tensors: dict[str, Tensor] = {}
    match step:
        case Adder() | Convolution():
            factors: Requantization | Linear = step.requantization
            tensors["weight"] = step.weight
        case Linear():
            factors = step
            tensors["weight"] = step.weight
        case Rescale() | AveragePool():
            factors = step.requantization
        case MaxPool():
            return tensors
        case _:
            assert_never(step)
    tensors |= {"multiplier": factors.multiplier, "offset": factors.offset, "shift": factors.shift}
    if isinstance(factors, Requantization):
        tensors["scale_exponent"] = factors.scale_exponent
        if factors.residual_multiplier is not None:
            tensors["residual_multiplier"] = factors.residual_multiplier
    return tensors


def powers_of_two(step: Step) -> bool:
    """Return whether each multiplier of a step is 0 or a power of two, of either sign."""
    sizes = [values.long().abs() for name, values in step_tensors(step).items() if name.endswith("multiplier")]
    return all(bool(((size & (size - 1)) == 0).all()) for size in sizes)


def reads(step: Step) -> tuple[int, ...]:
    """Return the numbers of the activations that a step reads."""
    requantization = requantization_of(step)
    residual = None if requantization is None else requantization.residual
    return (step.input,) if residual is None else (step.input, residual)


def last_use(plan: IntegerPlan) -> dict[int, int]:
    """Return the index of the last step that reads each activation; the network's output outlives all steps."""
    found = {number: index for index, step in enumerate(plan.steps) for number in reads(step)}
    last = plan.steps[-1]
    if not isinstance(last, Linear):
        found[last.output] = len(plan.steps)
    return found


def halos(plan: IntegerPlan) -> list[tuple[int, int]]:
    """Return the largest padding, in ``(rows, columns)``, that the layers which read each activation need."""
    needed = dict.fromkeys(range(len(plan.activations)), (0, 0))
    for step in plan.steps:
        if isinstance(step, Filters):  # max-pooling skips padded taps
            rows, columns = needed[step.input]
            needed[step.input] = max(rows, step.window.padding[0]), max(columns, step.window.padding[1])
    return list(needed.values())
