"""Where the activations of a plan lie in one block of memory: those that are not alive together share it."""

import dataclasses

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
    """Place the largest activations first, each at the lowest offset that is free for as long as it lives.

    An activation lives from the step that writes it to the last that reads it, so that no step writes what it reads.
    """
    last, around = last_use(plan), halos(plan)
    born = {0: -1} | {step.output: index for index, step in enumerate(plan.steps) if not isinstance(step, Linear)}
    sizes = {}
    for number in born:
        activation, (rows, columns) = plan.activations[number], around[number]
        pixels = (activation.height + 2 * rows) * (activation.width + 2 * columns)
        sizes[number] = -(-pixels * activation.channels // ALIGNMENT) * ALIGNMENT
    placed: dict[int, int] = {}
    for number in sorted(sizes, key=lambda number: -sizes[number]):
        alive = born[number], last.get(number, born[number])
        others = sorted(
            (placed[other], placed[other] + sizes[other])
            for other in placed
            if born[other] <= alive[1] and alive[0] <= last.get(other, born[other])
        )
        offset = 0
        for begin, end in others:
            if offset + sizes[number] <= begin:
                break
            offset = max(offset, end)
        placed[number] = offset
    total = max(offset + sizes[number] for number, offset in placed.items())
    return Arena(tuple(around), tuple(placed.get(number, -1) for number in range(len(plan.activations))), total)
