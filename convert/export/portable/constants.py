"""The constants of a plan's steps, by name, and the numbers of what it reads."""

import torch
from torch import Tensor

from ....adder_layers.integer.plan import Adder, Convolution, IntegerPlan, Linear, Step, requantization_of


def constants(step: Step) -> dict[str, Tensor]:
    """Weight and factors of a step, by their field's name, as far as it has them."""
    found = {"weight": step.weight} if isinstance(step, Adder | Convolution | Linear) else {}
    factors = step if isinstance(step, Linear) else requantization_of(step)
    if factors is None:
        return found
    found |= {"multiplier": factors.multiplier, "offset": factors.offset, "shift": factors.shift}
    if not isinstance(factors, Linear):
        found["exponent"] = factors.exponent
        if factors.residual_multiplier is not None:
            found["residual_multiplier"] = factors.residual_multiplier
    return found


def padded(plan: IntegerPlan) -> list[int]:
    """Numbers of the activations whose ``zero`` is read, because a layer pads them."""
    readers = [step for step in plan.steps if isinstance(step, Adder | Convolution) and any(step.window.padding)]
    return sorted({step.input for step in readers})


def by_shifts(step: Step) -> bool:
    """Whether all multipliers of a step's requantization are powers of two, of either sign, or 0."""
    return requantization_of(step) is not None and powers_of_two(step)


def powers_of_two(step: Step) -> bool:
    """Whether all multipliers of a step are powers of two, of either sign, or 0."""
    sizes = [values.long().abs() for name, values in constants(step).items() if name.endswith("multiplier")]
    return all(bool(((size & (size - 1)) == 0).all()) for size in sizes)


def shift_codes(factors: Tensor) -> Tensor:
    """Powers of two ``±2^k`` int32 as ``±(k + 1)`` int8, and 0 as 0."""
    sizes = factors.long().abs()
    bits = torch.frexp(sizes.double()).exponent  # 2^k is 0.5 · 2^(k + 1), and 0 has the exponent 0
    return (bits * factors.sign()).to(torch.int8)
