"""Where the activations of a plan lie in one block of memory: those that are not alive together share it."""

import dataclasses
from collections.abc import Mapping

from .plan import IntegerPlan, Linear, halos, last_use

ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Arena:
    """Layout of a plan's activations, for one image.

    Args:
        halos: For each activation, ``(rows, columns)`` of padding on each side.
        offsets: For each activation, its first byte; ``-1`` for one that nothing writes.
        bytes: Size of the whole.
    """

    halos: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    bytes: int


def lay_out(plan: IntegerPlan) -> Arena:
    """Place the activations with what padding they need around them.

    An activation lives from the step that writes it to the last that reads it, so that no step writes what it reads.
    """
    last, around = last_use(plan), halos(plan)
    born = {0: -1} | {step.output: index for index, step in enumerate(plan.steps) if not isinstance(step, Linear)}
    sizes = {}
    for number in born:
        activation, (rows, columns) = plan.activations[number], around[number]
        pixels = (activation.height + 2 * rows) * (activation.width + 2 * columns)
        sizes[number] = -(-pixels * activation.channels // ALIGNMENT) * ALIGNMENT
    lives = {number: (begin, last.get(number, begin)) for number, begin in born.items()}
    placed = place(sizes, lives)
    total = max(offset + sizes[number] for number, offset in placed.items())
    return Arena(tuple(around), tuple(placed.get(number, -1) for number in range(len(plan.activations))), total)


def place(sizes: Mapping[int, int], lives: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Offsets of numbered buffers in one block: the largest first, each as low as it is free for as long as it lives.

    Args:
        sizes: Bytes of each buffer.
        lives: Its first and its last step, both included.
    """
    placed: dict[int, int] = {}
    for number in sorted(sizes, key=lambda number: (-sizes[number], lives[number])):
        first, last = lives[number]
        offset = 0
        for other in sorted(placed, key=placed.__getitem__):
            alive_together = first <= lives[other][1] and lives[other][0] <= last
            if alive_together and placed[other] < offset + sizes[number]:
                offset = max(offset, placed[other] + sizes[other])
        placed[number] = offset
    return placed
