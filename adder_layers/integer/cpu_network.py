"""Hand an integer plan to the C++ executor. Importing this file needs the C++ extension."""

from torch import Tensor
from typing_extensions import assert_never

from .. import _cpu
from ..geometry import POINT, Window
from .memory_layout import lay_out
from .plan import (
    Adder,
    AveragePool,
    Convolution,
    Filters,
    IntegerPlan,
    Linear,
    MaxPool,
    Rescale,
    Step,
    requantization_of,
)


def build_network(plan: IntegerPlan, instruction_set: str) -> _cpu.Network:
    """Build the executor of a plan.

    Args:
        plan: The network; it has been checked.
        instruction_set: One of ``_cpu.integer_available()``.
    """
    arena = lay_out(plan)
    activations = [
        _cpu.Activation(
            channels=activation.channels,
            height=activation.height,
            width=activation.width,
            halo=halo,
            offset=offset,
            zero_point=activation.zero_point.contiguous(),
        )
        for activation, halo, offset in zip(plan.activations, arena.halos, arena.offsets, strict=True)
    ]
    network = _cpu.Network(instruction_set, activations=activations, arena_bytes=arena.bytes)
    for step in plan.steps:
        weight: Tensor | None = getattr(step, "weight", None)
        network.add(_config(step, plan), None if weight is None else weight.contiguous(), _factors(step))
    return network


def _config(step: Step, plan: IntegerPlan) -> _cpu.StepConfig:
    source = plan.activations[step.input]
    requantization = requantization_of(step)
    window = _window(step, plan)
    return _cpu.StepConfig(
        kind=_kind(step),
        input=step.input,
        output=None if isinstance(step, Linear) else step.output,
        residual=None if requantization is None else requantization.residual,
        filters=len(step.offset) if isinstance(step, Linear) else plan.activations[step.output].channels,
        groups=_groups(step, source.channels),
        terms=step.terms if isinstance(step, Filters) else 1,
        quant_max=0 if requantization is None else requantization.quant_max,
        kernel=window.kernel,
        stride=window.stride,
        padding=window.padding,
        dilation=window.dilation,
    )


def _kind(step: Step) -> _cpu.Kind:
    match step:
        case Adder():
            return _cpu.Kind.adder
        case Convolution():
            return _cpu.Kind.convolution
        case AveragePool() | Rescale():
            return _cpu.Kind.window_sum
        case MaxPool():
            return _cpu.Kind.window_largest
        case Linear():
            return _cpu.Kind.linear
        case _:
            assert_never(step)


def _window(step: Step, plan: IntegerPlan) -> Window:
    match step:
        case Linear():  # a convolution whose window is its whole input
            source = plan.activations[step.input]
            return POINT._replace(kernel=(source.height, source.width))
        case Rescale():
            return POINT
        case Adder() | Convolution() | AveragePool() | MaxPool():
            return step.window
        case _:
            assert_never(step)


def _groups(step: Step, channels: int) -> int:
    match step:
        case Adder() | Convolution():
            return step.groups
        case Linear():
            return 1
        case Rescale() | AveragePool() | MaxPool():
            return channels
        case _:
            assert_never(step)


def _factors(step: Step) -> _cpu.StepFactors:
    if isinstance(step, Linear):
        return _cpu.StepFactors(multiplier=_wide(step.multiplier), offset=_wide(step.offset), shift=_wide(step.shift))
    factors = requantization_of(step)
    if factors is None:
        return _cpu.StepFactors()
    added = factors.residual_multiplier
    return _cpu.StepFactors(
        multiplier=_wide(factors.multiplier),
        offset=_wide(factors.offset),
        shift=_wide(factors.shift),
        scale_exponent=_wide(factors.scale_exponent),
        residual=None if added is None else _wide(added),
    )


def _wide(factors: Tensor) -> Tensor:
    return factors.long().contiguous()
