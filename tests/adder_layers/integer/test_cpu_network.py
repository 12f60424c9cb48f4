"""The border to C++: what does not fit is refused, and nothing is converted silently."""

import pytest
import torch

pytest.importorskip("adderkit.adder_layers._cpu")

from adderkit.adder_layers import _cpu
from adderkit.adder_layers.integer.cpu_network import build_network
from tests.adder_layers.integer.random_plans import plain_network, residual_network

POINT = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}


def network(channels=3):
    zero_point = torch.zeros(channels, dtype=torch.uint8)
    shape = {"channels": channels, "height": 4, "width": 5}
    activations = [
        _cpu.Activation(**shape, halo=(0, 0), offset=index * 60, zero_point=zero_point) for index in range(2)
    ]
    return _cpu.Network("baseline", activations=activations, arena_bytes=120)


def config(kind, **changes):
    fields = {"kind": kind, "input": 0, "output": 1, "residual": None, "filters": 3, "groups": 1, "terms": 1}
    return _cpu.StepConfig(**fields | {"quant_max": 255} | POINT | changes)


def factors(count=3, **changes):
    ones = torch.ones(count, dtype=torch.int64)
    return _cpu.StepFactors(**{"multiplier": ones, "offset": ones, "shift": ones} | changes)


WEIGHT = torch.zeros(3, 1, 1, 3, dtype=torch.uint8)


def test_the_arguments_that_bad_ones_start_from_are_good():
    built = network()
    built.add(config(_cpu.Kind.adder), WEIGHT, factors())
    output = torch.full((2, 4, 5, 3), 7, dtype=torch.uint8)
    built.run(torch.zeros(2, 4, 5, 3, dtype=torch.uint8), output, threads=1)
    assert (output == 0).all()


@pytest.mark.parametrize(
    ("step", "weight", "values", "message"),
    [
        (config(_cpu.Kind.adder), WEIGHT.to(torch.int8), factors(), "not uint8"),
        (config(_cpu.Kind.convolution), WEIGHT, factors(), "int8"),
        (config(_cpu.Kind.adder), WEIGHT[:2], factors(), "size of the step's window"),
        (config(_cpu.Kind.adder, kernel=(3, 1)), WEIGHT, factors(), "size of the step's window"),
        (config(_cpu.Kind.adder, terms=2), WEIGHT, factors(), "size of the step's window"),
        (config(_cpu.Kind.adder), None, factors(), "have a weight"),
        (config(_cpu.Kind.window_sum), WEIGHT, factors(), "have none"),
        (config(_cpu.Kind.adder), WEIGHT, factors(2), "one value for each output channel"),
        (config(_cpu.Kind.adder), WEIGHT, factors(residual=torch.ones(3).long()), "one value for each output channel"),
        (config(_cpu.Kind.adder, quant_max=63), WEIGHT, factors(), "one value for each output channel"),
    ],
    ids=["int8", "uint8", "filters", "window", "terms", "no-weight", "weight", "factors", "residual", "exponents"],
)
def test_a_step_that_does_not_fit_is_refused(step, weight, values, message):
    with pytest.raises(ValueError, match=message):
        network().add(step, weight, values)


@pytest.mark.parametrize(("kind", "terms"), [(_cpu.Kind.convolution, 2), (_cpu.Kind.adder, 0)], ids=str)
def test_terms_of_what_has_none_are_refused(kind, terms):
    with pytest.raises(ValueError, match="several terms"):
        config(kind, terms=terms)


@pytest.mark.parametrize("changes", [{"input": 2}, {"output": 2}, {"input": -1}], ids=str)
def test_an_activation_that_does_not_exist_is_refused(changes):
    with pytest.raises(IndexError):
        network().add(config(_cpu.Kind.adder, **changes), WEIGHT, factors())


def test_factors_are_not_converted():
    with pytest.raises(TypeError, match="multiplier"):
        factors(multiplier=torch.ones(3, dtype=torch.int32))


def test_a_zero_point_for_each_channel_is_expected():
    with pytest.raises(ValueError, match="zero_point"):
        _cpu.Activation(
            channels=3, height=1, width=1, halo=(0, 0), offset=0, zero_point=torch.zeros(2, dtype=torch.uint8)
        )


BYTES, LOGITS = {"dtype": torch.uint8}, {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("images", "columns", "output", "error"),
    [
        ({"dtype": torch.float32}, 0, torch.zeros(1, 7, **LOGITS), TypeError),
        (BYTES, -1, torch.zeros(1, 7, **LOGITS), ValueError),
        (BYTES, 0, torch.zeros(1, 7), ValueError),
        (BYTES, 0, torch.zeros(2, 7, **LOGITS), ValueError),
    ],
    ids=["float-images", "size", "float-logits", "batch"],
)
def test_images_and_output_that_do_not_fit_are_refused(images, columns, output, error):
    plan = plain_network().plan()
    first = plan.activations[0]
    image = torch.zeros(1, first.height, first.width + columns, first.channels, **images)
    with pytest.raises(error):
        build_network(plan, "baseline").run(image, output, threads=1)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="instruction set 'mmx' is not available"):
        build_network(residual_network().plan(), "mmx")
