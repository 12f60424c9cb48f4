"""Arena of a network in C: one block of memory, in which activations that do not live at the same time share bytes."""

import dataclasses

from ....adder_layers.integer.memory_layout import place
from ....adder_layers.integer.plan import IntegerPlan, Linear, Rescale, last_use, reads


@dataclasses.dataclass(frozen=True)
class Arena:
    """Size of the arena, and the positions of activations in it.

    Args:
        offsets: First byte of each activation, by its number; without the image and the network's output, which belong
            to the caller.
        size: Number of bytes.
    """

    offsets: dict[int, int]
    size: int


@dataclasses.dataclass
class _Buffer:
    """Bytes that several activations use one after the other, each overwriting the previous one."""

    activations: list[int]
    size: int
    first: int
    last: int


def plan_arena(plan: IntegerPlan) -> Arena:
    """Place the activations so that those that live at the same time do not overlap.

    A step overwrites the residual that it adds if nothing reads it later, which halves the memory of a residual block.
    """
    buffers = dict(enumerate(_buffers(plan)))
    sizes = {number: buffer.size for number, buffer in buffers.items()}
    placed = place(sizes, {number: (buffer.first, buffer.last) for number, buffer in buffers.items()})
    offsets = {each: placed[number] for number, buffer in buffers.items() for each in buffer.activations}
    return Arena(offsets, max((placed[number] + size for number, size in sizes.items()), default=0))


def _buffers(plan: IntegerPlan) -> list[_Buffer]:
    ends = last_use(plan)
    buffers: dict[int, _Buffer] = {}
    for index, step in enumerate(plan.steps[: len(plan.steps) - 1]):  # the caller owns what the last one writes
        assert not isinstance(step, Linear)
        last = ends.get(step.output, index)
        # A residual is read byte by byte where the output is written, as is the input of a rescaling.
        same_place = reads(step) if isinstance(step, Rescale) else set(reads(step)) - {step.input}
        free = [number for number in same_place if number in buffers and ends[number] == index]
        if free:
            buffer = buffers[free[0]]
            buffer.activations.append(step.output)
            buffer.last = last
        else:
            activation = plan.activations[step.output]
            size = activation.channels * activation.height * activation.width
            buffer = _Buffer([step.output], size, index, last)
        buffers[step.output] = buffer
    return list({id(buffer): buffer for buffer in buffers.values()}.values())
