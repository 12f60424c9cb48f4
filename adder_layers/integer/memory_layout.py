"""Memory layout of a plan's activations for the C++ engine: those that do not live at the same time share bytes."""

import dataclasses
from collections.abc import Mapping

from .plan import IntegerPlan, Linear, halos, last_use

ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class MemoryLayout:
    """Positions of a plan's activations in one block of memory, for one image.

    Args:
        halos: ``(rows, columns)`` of padding on each side of each activation.
        offsets: First byte of each activation; ``-1`` for one that nothing writes.
        bytes: Size of the block.
    """

    halos: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    bytes: int


def lay_out(plan: IntegerPlan) -> MemoryLayout:
    """Place the activations, together with the padding that they need.

    An activation lives from the step that writes it to the last that reads it, so that no step writes what it reads.
    """
    last, around = last_use(plan), halos(plan)
    born = {0: -1} | {step.output: index for index, step in enumerate(plan.steps) if not isinstance(step, Linear)}
    sizes = {}
    for number in born:
        activation, (rows, columns) = plan.activations[number], around[number]
        pixels = (activation.height + 2 * rows) * (activation.width + 2 * columns)
        sizes[number] = -(-pixels * activation.channels // ALIGNMENT) * ALIGNMENT
    lifetimes = {number: (begin, last.get(number, begin)) for number, begin in born.items()}
    offsets = place(sizes, lifetimes)
    total = max(offset + sizes[number] for number, offset in offsets.items())
    return MemoryLayout(tuple(around), tuple(offsets.get(number, -1) for number in range(len(plan.activations))), total)


def place(sizes: Mapping[int, int], lifetimes: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Place numbered buffers in one block: the largest first, each at the lowest offset that is free while it lives.

    Args:
        sizes: Bytes of each buffer.
        lifetimes: First and last step of each buffer, both included.

    Returns:
        The offset of each buffer.
    """
    placed: dict[int, int] = {}
    for number in sorted(sizes, key=lambda number: (-sizes[number], lifetimes[number])):
        first, last = lifetimes[number]
        offset = 0
        for other in sorted(placed, key=placed.__getitem__):
            alive_together = first <= lifetimes[other][1] and lifetimes[other][0] <= last
            if alive_together and placed[other] < offset + sizes[number]:
                offset = max(offset, placed[other] + sizes[other])
        placed[number] = offset
    return placed
