"""Plans that are refused, and sums at the edge of 32 bits."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.check import TOTAL_LIMIT, _windows_hold_pixels, check_plan, extremes
from adderkit.adder_layers.integer.plan import Adder, Convolution, IntegerPlan, Linear, Requantization
from tests.adder_layers.integer.random_plans import LAYERS, POINT, Builder, Layer, residual_network, single, square


def changed(plan: IntegerPlan, index: int, **fields: object) -> IntegerPlan:
    """The plan with a step's fields replaced."""
    steps = list(plan.steps)
    steps[index] = dataclasses.replace(steps[index], **fields)
    return dataclasses.replace(plan, steps=tuple(steps))


def refactored(plan: IntegerPlan, index: int, **fields: object) -> IntegerPlan:
    """The plan with fields of a step's requantization replaced."""
    return changed(plan, index, requantization=dataclasses.replace(plan.steps[index].requantization, **fields))


@pytest.mark.parametrize("seed", range(3))
def test_good_plans_pass(seed):
    plan = residual_network(seed).plan()
    found = check_plan(plan)
    assert len(found) == len(plan.steps)
    assert all(each.least <= each.largest for each in found)


@pytest.mark.parametrize("cls", [Adder, Convolution])
@pytest.mark.parametrize("name", LAYERS)
def test_extremes_are_reached(name, cls):
    """A convolution's at 255 where its weight is positive or negative, an adder's largest at the byte farther away."""
    layer = dataclasses.replace(LAYERS[name], residual=False)
    step = single(cls, layer).plan().steps[0]
    weight = step.weight.flatten(1).long()
    found = extremes(step)
    if cls is Adder:
        reached = torch.where(weight > 127, weight, 255 - weight)
        factors = 2 ** torch.arange(layer.terms).flip(0)
        reached = (reached.unflatten(1, (layer.terms, -1)).sum(2) * factors).sum(1)
        assert (found.least, found.largest) == (0, reached.max())
    else:
        assert found.largest == (255 * weight * (weight > 0)).sum(1).max()
        assert found.least == (255 * weight * (weight < 0)).sum(1).min()


def one_step(multiplier: int, offset: int, shift: int, channels: int = 1) -> IntegerPlan:
    """A 1x1 adder layer whose sum is between 0 and 255 times its channels."""
    builder = Builder(channels, 2, 2)
    builder.layer(Adder, 1, POINT)
    factors = Requantization(
        torch.tensor([multiplier], dtype=torch.int32),
        torch.tensor([offset]),
        torch.tensor([shift], dtype=torch.uint8),
        torch.zeros(1, dtype=torch.uint8),
    )
    weight = torch.zeros(1, 1, 1, channels, dtype=torch.uint8)
    return changed(builder.plan(), 0, requantization=factors, weight=weight)


@pytest.mark.parametrize("sign", [1, -1])
def test_totals_pass_up_to_the_limit_and_not_beyond(sign):
    multiplier = sign * (2**31 - 1)
    room = TOTAL_LIMIT - 1 - 255 * (2**31 - 1)
    check_plan(one_step(multiplier, sign * room, 62))
    with pytest.raises(ValueError, match=r"step 0 \(adder adder0\) could overflow: .*below 2\^62"):
        check_plan(one_step(multiplier, sign * (room + 1), 62))


def test_a_plan_at_the_limit_computes_what_unbounded_integers_give():
    plan = one_step(2**31 - 1, TOTAL_LIMIT - 1 - 255 * (2**31 - 1), 54)
    image = torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)
    assert reference.run(plan, image).unique().tolist() == [(TOTAL_LIMIT - 1) // 2**54]


def test_sums_beyond_32_bits_are_refused():
    """255 · channels just fits, or not; the weights are a view of one zero, so nothing is allocated."""
    most = (2**31 - 1) // 255
    for channels, fits in ((most, True), (most + 1, False)):
        plan = one_step(1, 0, 0)
        wide = torch.zeros(1, dtype=torch.uint8).expand(1, 1, 1, channels)
        activations = (
            dataclasses.replace(plan.activations[0], channels=channels, zero_point=wide.reshape(-1)),
            plan.activations[1],
        )
        plan = dataclasses.replace(changed(plan, 0, weight=wide), activations=activations)
        if fits:
            assert check_plan(plan)[0].largest == 255 * most
        else:
            with pytest.raises(ValueError, match="could overflow"):
                check_plan(plan)


def test_the_residual_counts():
    plan = single(Adder, Layer(3, 3, residual=True)).plan()
    room = TOTAL_LIMIT - 1
    factors = {
        "multiplier": torch.zeros(3, dtype=torch.int32),
        "residual_multiplier": torch.full((3,), 2**31 - 1).int(),
    }
    check_plan(refactored(plan, 1, offset=torch.full((3,), room - 255 * (2**31 - 1)), **factors))
    with pytest.raises(ValueError, match="could overflow"):
        check_plan(refactored(plan, 1, offset=torch.full((3,), room - 255 * (2**31 - 1) + 1), **factors))


def test_logits_fit_32_bits():
    builder = Builder(2, 1, 1)
    builder.linear(1)
    ones = {"weight": torch.zeros(1, 2, dtype=torch.int8), "multiplier": torch.ones(1, dtype=torch.int32)}
    zero = torch.zeros(1, dtype=torch.uint8)
    check_plan(changed(builder.plan(), 0, offset=torch.tensor([2**31 - 1]), shift=zero, **ones))
    with pytest.raises(ValueError, match="could overflow"):
        check_plan(changed(builder.plan(), 0, offset=torch.tensor([2**31]), shift=zero, **ones))


NETWORK = (
    residual_network().plan()
)  # steps: 0 stem, 1 max-pooling, 2 and 3 adders, ..., 8 rescale, 9 average, 10 linear


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dataclasses.replace(NETWORK, steps=(), paths=()), "plan has 0 steps and 0 paths"),
        (dataclasses.replace(NETWORK, paths=NETWORK.paths[1:]), "11 steps and 10 paths"),
        (changed(NETWORK, 2, input=9), r"step 2 \(adder adder2\) reads activation 9, which no earlier step writes"),
        (refactored(NETWORK, 3, residual=9), "step 3 .* reads activation 9"),
        (changed(NETWORK, 2, output=1), "step 2 .* writes activation 1, expected one that nothing has written yet"),
        (changed(NETWORK, 2, output=99), "writes activation 99"),
        (
            dataclasses.replace(NETWORK, steps=(*NETWORK.steps, NETWORK.steps[-1]), paths=(*NETWORK.paths, "x")),
            "step 10 .*linear.* is not the last step",
        ),
        (changed(NETWORK, 10, input=9), r"weight of step 10 .* is \[10, 40\] torch.int8, expected \[10, 360\]"),
        (changed(NETWORK, 2, groups=3), "step 2 .* has 3 groups, expected a divisor of 16 and 16"),
        (changed(NETWORK, 2, weight=NETWORK.steps[2].weight[:, :1]), r"weight of step 2 .* is \[16, 1, 3, 16\]"),
        (changed(NETWORK, 2, weight=NETWORK.steps[2].weight.to(torch.int8)), "torch.int8, expected .* torch.uint8"),
        (changed(NETWORK, 2, window=square(3)), "step 2 .* writes 6x5 pixels, expected 4x3"),
        (changed(NETWORK, 2, window=square(3, 0, 1)), r"step 2 .* has stride \(0, 0\), expected at least 1"),
        (changed(NETWORK, 2, window=square(3, 1, -1)), r"step 2 .* has padding \(-1, -1\)"),
        (changed(NETWORK, 9, window=square(3, 1, 1)), r"step 9 .* has padding \(1, 1\) .* expected 0 and 1"),
        (refactored(NETWORK, 2, quant_max=256), "step 2 .* has quant_max 256, 256 after shifting, expected 1 to 255"),
        (
            refactored(NETWORK, 2, scale_exponent=torch.ones(16, dtype=torch.uint8)),
            "step 2 .* has quant_max 255, 510 after shifting",
        ),
        (
            refactored(NETWORK, 2, shift=torch.full((16,), 63, dtype=torch.uint8)),
            "shifts by 63 bits, expected at most 62",
        ),
        (refactored(NETWORK, 2, multiplier=torch.zeros(16)), "multiplier of step 2 .* torch.float32"),
        (refactored(NETWORK, 2, residual=2), "step 2 .* has a residual without a multiplier"),
        (refactored(NETWORK, 3, residual=0), "step 3 .* adds activation 0, whose size differs from that of its output"),
        (
            dataclasses.replace(
                NETWORK, activations=(dataclasses.replace(NETWORK.activations[0], scale=0.0), *NETWORK.activations[1:])
            ),
            "activation 0 has scale 0.0, expected a positive number",
        ),
        (
            dataclasses.replace(
                NETWORK, activations=(dataclasses.replace(NETWORK.activations[0], height=0), *NETWORK.activations[1:])
            ),
            "activation 0 has size 3x0x19",
        ),
    ],
)
def test_bad_plans_are_refused_by_name(plan, message):
    with pytest.raises(ValueError, match=message):
        check_plan(plan)


def test_pooling_windows_beyond_the_input_are_refused():
    """As torch does, whose ceil mode has no window that begins beyond the padding."""
    builder = Builder(3, 4, 4)
    builder.max_pool(square(2, 2), (3, 2))
    with pytest.raises(ValueError, match=r"step 0 .* has windows that hold no pixel"):
        check_plan(builder.plan())


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 9),
    length=st.integers(1, 8),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 5),
    padding=st.integers(0, 9),
    dilation=st.integers(1, 9),
)
def test_windows_hold_pixels_where_one_of_their_taps_is_inside(outputs, length, kernel, stride, padding, dilation):
    expected = all(
        any(0 <= begin * stride - padding + tap * dilation < length for tap in range(kernel))
        for begin in range(outputs)
    )
    assert _windows_hold_pixels(outputs, length, kernel, stride, padding, dilation) == expected


def test_a_pooling_window_of_any_size_is_checked_at_once():
    """Looking at each tap of each window would take longer than anybody waits."""
    assert _windows_hold_pixels(2**40, 2**40, 2**40, 1, 2**39, 1)


def test_the_network_of_the_tests_ends_in_logits():
    assert isinstance(NETWORK.steps[-1], Linear)
    assert NETWORK.ends_in_logits
