"""Where activations lie in one block of memory, so that those whose lives do not meet share it."""

import dataclasses

from ...adder_layers.integer.plan import IntegerPlan, Linear, Rescale, last_use, reads


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
    """Place the activations: the largest first, each as low as it fits beside those that live at the same time.

    A step that adds a residual nobody needs afterwards writes over it, which halves what a residual block needs.
    """
    placed: list[tuple[_Buffer, int]] = []
    for buffer in sorted(_buffers(plan), key=lambda buffer: (-buffer.size, buffer.first)):
        offset = 0
        for other, start in sorted(placed, key=lambda pair: pair[1]):
            alive_together = buffer.first <= other.last and other.first <= buffer.last
            if alive_together and start < offset + buffer.size:
                offset = max(offset, start + other.size)
        placed.append((buffer, offset))
    offsets = {number: offset for buffer, offset in placed for number in buffer.activations}
    return Arena(offsets, max((offset + buffer.size for buffer, offset in placed), default=0))


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
