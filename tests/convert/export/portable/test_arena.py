"""Activations in one block: whoever is still to be read is never written over, and memory is not wasted."""

import pytest

from adderkit.adder_layers.integer.plan import Adder, Linear, reads
from adderkit.convert.export.portable.arena import plan_arena

from .conftest import random_plans


def replay(plan, arena):
    """Run a plan on bytes that are only labels: who wrote them. Fails where a step reads another's bytes."""
    memory = [None] * arena.size

    def place(number):
        activation = plan.activations[number]
        start = arena.offsets[number]
        return range(start, start + activation.channels * activation.height * activation.width)

    for index, step in enumerate(plan.steps):
        for number in set(reads(step)) - {0}:
            assert {memory[byte] for byte in place(number)} == {number}, f"step {index} reads activation {number}"
        if isinstance(step, Linear) or index + 1 == len(plan.steps):
            continue
        # Only a residual, or a rescaling's input, may lie where the output is written, and then exactly there.
        windowed = {step.input} if step.kind != "rescale" else set()
        for number in set(reads(step)) - {0}:
            shared = set(place(number)) & set(place(step.output))
            assert not shared or (number not in windowed and place(number) == place(step.output))
        for byte in place(step.output):
            memory[byte] = step.output


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_written_over(seed):
    plan = random_plans.residual_network(seed, size=(23 + seed, 40 - 7 * seed)).plan()
    arena = plan_arena(plan)
    replay(plan, arena)
    assert set(arena.offsets) == set(range(1, len(plan.activations)))


def chain(*residuals):
    """Adder layers of one size; the numbers of activations that they add."""
    builder = random_plans.Builder(4, 5, 5)
    for residual in residuals:
        builder.layer(Adder, 4, random_plans.square(3, padding=1), residual=residual)
    return builder.plan()


@pytest.mark.parametrize(
    ("residuals", "activations"),
    [
        ((None,), 0),  # the image and the output are the caller's
        ((None, None), 1),
        ((None, None, None, None, None), 2),  # to and fro
        ((None, None, 1, None), 2),  # the residual's place is written over
        ((None, None, 1, 1, None), 3),  # not while it is needed again
        ((None, 1, None), 2),  # nor where the windows still read it
        ((None, None, None, 0, None), 2),  # nor the image
    ],
)
def test_smallest_memory(residuals, activations):
    plan = chain(*residuals)
    arena = plan_arena(plan)
    assert arena.size == activations * 4 * 5 * 5
    replay(plan, arena)


def test_rescaling_in_place_and_an_activation_that_nobody_reads():
    builder = random_plans.Builder(4, 5, 5)
    builder.rescale()
    builder.rescale()
    builder.rescale(residual=1)
    builder.layer(Adder, 4, random_plans.POINT, input=2)  # so that activation 3 is read by none
    plan = builder.plan()
    arena = plan_arena(plan)
    replay(plan, arena)
    assert arena.size == 200
