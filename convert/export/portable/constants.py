"""The constants of a plan's steps, by name, and the numbers of what it reads."""

import torch
from torch import Tensor

from ....adder_layers.integer.plan import Adder, Convolution, IntegerPlan, Step, powers_of_two, requantization_of


def padded(plan: IntegerPlan) -> list[int]:
    """Numbers of the activations whose ``zero`` is read, because a layer pads them."""
    readers = [step for step in plan.steps if isinstance(step, Adder | Convolution) and any(step.window.padding)]
    return sorted({step.input for step in readers})


def by_shifts(step: Step) -> bool:
    """Whether all multipliers of a step's requantization are powers of two, of either sign, or 0."""
    return requantization_of(step) is not None and powers_of_two(step)


def shift_codes(factors: Tensor) -> Tensor:
    """Powers of two ``±2^k`` int32 as ``±(k + 1)`` int8, and 0 as 0."""
    sizes = factors.long().abs()
    bits = torch.frexp(sizes.double()).exponent  # 2^k is 0.5 · 2^(k + 1), and 0 has the exponent 0
    return (bits * factors.sign()).to(torch.int8)
