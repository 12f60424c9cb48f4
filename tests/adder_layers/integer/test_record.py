import json

import pytest
import torch

from adderkit.adder_layers.integer.network import IntegerNetwork
from adderkit.adder_layers.integer.record import empty_plan, structure_of, tensors_of, with_tensors
from adderkit.adder_layers.integer.reference import quantize, run
from tests.adder_layers.integer.random_plans import plain_network, residual_network

NETWORKS = {"residual": residual_network, "plain": plain_network, "terms": lambda: residual_network(terms=3)}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def builder(request):
    return request.param()


def test_plan_comes_back_from_json_and_tensors(builder):
    plan = builder.plan()
    empty = empty_plan(json.loads(json.dumps(structure_of(plan))))
    tensors = dict(tensors_of(plan))
    assert {name: (each.shape, each.dtype) for name, each in tensors_of(empty)} == {
        name: (each.shape, each.dtype) for name, each in tensors.items()
    }
    image = builder.image()
    assert torch.equal(run(with_tensors(empty, tensors), image), run(plan, image))


def test_network_is_the_reference_behind_rounding(builder):
    plan = builder.plan()
    network = IntegerNetwork(plan)
    first = plan.activations[0]
    images = torch.randn(3, first.channels, first.height, first.width)
    expected = run(plan, quantize(images, first.scale, first.zero_point)) * plan.steps[-1].scale
    assert torch.equal(network(images), expected.float())
    again = IntegerNetwork(empty_plan(structure_of(plan)))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(images), network(images))


def test_images_of_another_size(builder):
    with pytest.raises(ValueError, match="an integer network accepts images of one size"):
        IntegerNetwork(builder.plan())(torch.zeros(1, 3, 4, 4))


WRONG = {
    "activations": ({"activations": []}, "activations is"),
    "size": ({"activations": [[3, 0, 3, 0.1]]}, "a size of activation 0 is 0"),
    "scale": ({"activations": [[3, 3, 3, -1.0]]}, "scale of activation 0 is -1.0"),
    "steps": ({"steps": 3}, "steps is 3"),
    "kind": (
        {"steps": [{"kind": "gate", "path": "x", "input": 0, "output": 1}]},
        "kind of step 0 is 'gate', which",
    ),
    "input": ({"steps": [{"kind": "linear", "path": "x", "input": 99, "outputs": 2}]}, "input of step 0 is 99"),
    "step": ({"steps": [None]}, "step 0 is None, expected an object"),
}


@pytest.mark.parametrize(("kind", "terms"), [("adder", 25), ("adder", 0), ("adder", "2"), ("convolution", 2)])
def test_wrong_terms(kind, terms):
    structure = structure_of(residual_network(terms=2).plan())
    step = next(step for step in structure["steps"] if step["kind"] == kind)
    with pytest.raises(ValueError, match=f"terms of step . is {terms!r}, expected a whole number from 1"):
        empty_plan({**structure, "steps": [{**step, "terms": terms}]})


def test_one_term_is_not_recorded():
    assert not any("terms" in step for step in structure_of(residual_network().plan())["steps"])


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_structures(change, message):
    structure = structure_of(residual_network().plan())
    with pytest.raises(ValueError, match=message):
        empty_plan({**structure, **change})
