"""A quantized network as a flat plan: what each step reads, computes and writes, in integers alone.

An activation is bytes ``[H, W, C]``; a byte ``q`` of channel ``c`` stands for the real value ``scale · (q - zero[c])``,
and a padded tap is the byte ``zero[c]``. An adder layer's weights are bytes on the very grid of its input, since only a
common step gives ``|s·q - s·w| = s·|q - w|`` (arXiv 2101.10015; literature of shared scales).

Every step ends in the same requantization of its sum ``a`` to a byte of channel ``c``:

    t = a · multiplier[c] + r · residual_multiplier[c] + offset[c]          (int64; r is the residual's byte)
    q = min(max(t, 0) >> shift[c], levels) << exponent[c]

``offset`` holds the rounding half, the zero points, BatchNorm's shift and the constants of clamped weights; ReLU is the
``max`` with a zero point of 0. With fewer than 8 bits, ``levels`` is ``2^bits - 1`` and ``exponent`` gives each group
of channels a step of its own, a power of two times the finest one: codes are stored shifted, so that kernels which take
bytes need not know of groups.

A plan is data: ``reference.py`` says what it computes, ``cpu_engine.py`` computes it fast.
"""

import dataclasses
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..geometry import Window


@dataclasses.dataclass(frozen=True)
class Activation:
    """Bytes between two steps.

    Args:
        channels: Number of channels.
        height: Rows in pixels.
        width: Columns in pixels.
        scale: Real value of one unit of the byte.
        zero: The byte that stands for 0, ``[C]`` uint8.
    """

    channels: int
    height: int
    width: int
    scale: float
    zero: Tensor


@dataclasses.dataclass(frozen=True)
class Requantization:
    """From a step's sums to the bytes it writes; see the module's formula.

    Args:
        multiplier: ``[O]`` int32, of either sign.
        offset: ``[O]`` int64.
        shift: ``[O]`` uint8, at most 62.
        exponent: ``[O]`` uint8, ``levels << exponent`` at most 255.
        levels: Largest code, ``2^bits - 1``.
        residual: Number of the activation that is added, of the output's shape; ``None`` for none.
        residual_multiplier: ``[O]`` int32; ``None`` without a residual.
    """

    multiplier: Tensor
    offset: Tensor
    shift: Tensor
    exponent: Tensor
    levels: int = 255
    residual: int | None = None
    residual_multiplier: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Filters:
    """What an adder layer and a convolution are alike: filters over windows of bytes; padded taps are ``zero``.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        weight: ``[O, kh, kw, C / groups]`` of ``weight_dtype``.
        window: Kernel, stride, padding and dilation.
        groups: Number of channel groups.
        requantization: From sums to bytes.
    """

    kind: ClassVar[str]
    weight_dtype: ClassVar[torch.dtype]

    input: int
    output: int
    weight: Tensor
    window: Window
    groups: int
    requantization: Requantization


class Adder(Filters):
    """``a[o] = Σ|q - w[o]|`` over a window of bytes; the weight is uint8."""

    kind = "adder"
    weight_dtype = torch.uint8


class Convolution(Filters):
    """``a[o] = Σ q·w[o]``, for the first layer and those kept as convolutions; the weight is int8.

    The zero point's part ``-zero·Σw`` is in the offset, which is exact because padded taps are ``zero`` as well.
    """

    kind = "convolution"
    weight_dtype = torch.int8


@dataclasses.dataclass(frozen=True)
class Rescale:
    """``a`` is the input's byte itself: a residual sum, a BatchNorm or an activation that stand alone.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes, of the input's shape.
        requantization: From bytes to bytes, perhaps with a residual.
    """

    kind: ClassVar[str] = "rescale"

    input: int
    output: int
    requantization: Requantization


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """The largest byte of a window; padded taps do not count. Codes keep their meaning, so nothing is requantized.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes, with the input's scale and zero; its size may be rounded up.
        window: Kernel, stride, padding and dilation.
    """

    kind: ClassVar[str] = "max_pool"

    input: int
    output: int
    window: Window


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """``a`` is the sum of a window's bytes; the requantization divides. There is no padding.

    Args:
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        window: Kernel and stride; padding 0, dilation 1.
        requantization: From sums to bytes.
    """

    kind: ClassVar[str] = "average_pool"

    input: int
    output: int
    window: Window
    requantization: Requantization


@dataclasses.dataclass(frozen=True)
class Linear:
    """The classifier: ``logit[o] = (Σ q·w[o] · multiplier[o] + offset[o]) >> shift[o]``, int32, of a whole activation.

    Args:
        input: Number of the activation it reads; all of its bytes count, mostly of one pixel.
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
    """A network for images of one size.

    Args:
        activations: All that is written; number 0 is the image, the last step's output (unless it is ``Linear``) the
            network's.
        steps: In order; each reads what an earlier one wrote, and each activation is written once.
        paths: For each step, the path of the layer in the original model that it comes from, for reports.
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
        tensors["exponent"] = factors.exponent
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
    """For each activation, the index of the last step that reads it; the network's output outlives all steps."""
    found = {number: index for index, step in enumerate(plan.steps) for number in reads(step)}
    last = plan.steps[-1]
    if not isinstance(last, Linear):
        found[last.output] = len(plan.steps)
    return found


def halos(plan: IntegerPlan) -> list[tuple[int, int]]:
    """For each activation, the ``(rows, columns)`` of padding that the layers which read it need at the most."""
    needed = dict.fromkeys(range(len(plan.activations)), (0, 0))
    for step in plan.steps:
        if isinstance(step, Adder | Convolution):
            rows, columns = needed[step.input]
            needed[step.input] = max(rows, step.window.padding[0]), max(columns, step.window.padding[1])
    return list(needed.values())
