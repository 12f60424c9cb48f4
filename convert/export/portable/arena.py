"""Where activations lie in one block of memory, so that those whose lives do not meet share it."""

import dataclasses

from ....adder_layers.integer.arena import place
from ....adder_layers.integer.plan import IntegerPlan, Linear, Rescale, last_use, reads


@dataclasses.dataclass(frozen=True)
class Arena:
    """A block of bytes and who lies where in it.

    Args:
        offsets: Byte at which each activation begins, by its number; not of the image and of the network's output,
            which belong to the caller.
        size: Bytes in all.
    """

    offsets: dict[int, int]
    size: int


@dataclasses.dataclass
class _Buffer:
    """Bytes that one activation after the other has, each written over the one before."""

    activations: list[int]
    size: int
    first: int
    last: int


def plan_arena(plan: IntegerPlan) -> Arena:
    """Place the activations where those that live at the same time do not meet.

    A step that adds a residual nobody needs afterwards writes over it, which halves what a residual block needs.
    """
    buffers = dict(enumerate(_buffers(plan)))
    sizes = {number: buffer.size for number, buffer in buffers.items()}
    placed = place(sizes, {number: (buffer.first, buffer.last) for number, buffer in buffers.items()})
    offsets = {each: placed[number] for number, buffer in buffers.items() for each in buffer.activations}
    return Arena(offsets, max((placed[number] + size for number, size in sizes.items()), default=0))


def _buffers(plan: IntegerPlan) -> list[_Buffer]:
    ends = last_use(plan)
    buffers: dict[int, _Buffer] = {}
    for index, step in enumerate(plan.steps[: len(plan.steps) - 1]):  # what the last one writes is the caller's
        assert not isinstance(step, Linear)
        last = ends.get(step.output, index)
        # Byte for byte: a residual is read where the output is written, and so is the input of a rescaling.
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
