"""Operations of a network, against torch's own counter and by hand."""

import json

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adderkit.convert.config import AdderConfig
from adderkit.convert.cost import cost
from adderkit.convert.errors import AdderkitError
from adderkit.convert.rewrite import convert_, revert_

IMAGE = torch.zeros(1, 3, 32, 32)


def flops(model, image):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg_small", "test_resnet", "test_efficientnet"])
def test_products_of_a_cnn_are_half_its_flops(name):
    model = timm.create_model(name)
    result = cost(model, IMAGE)
    assert result.multiplications == result.additions == flops(model, IMAGE) // 2
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_linear_layer_on_tokens():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(64, 5))
    result = cost(model, IMAGE)
    assert result.multiplications == flops(model, IMAGE) // 2
    assert [layer.output_shape for layer in result.layers] == [(8, 8, 8), (8, 5)]


def test_adder_layers_multiply_nothing_and_add_twice_a_term(tiny, tiny_adders):
    model = tiny()
    before = {layer.path: layer for layer in cost(model, IMAGE).layers}
    convert_(model, example_input=IMAGE)
    after = {layer.path: layer for layer in cost(model, IMAGE).layers}
    for path in tiny_adders:
        assert after[path].cls == "AdderConv2d"
        assert after[path].multiplications == 0
        assert after[path].additions == 2 * before[path].multiplications
    assert {path: after[path] for path in ("stem", "head")} == {path: before[path] for path in ("stem", "head")}


def test_resnet20_as_in_the_paper():
    # He et al. and AdderNet: 41 M products, of which 0.44 M in the stem and 640 in the classifier stay.
    model = timm.create_model("cifar_resnet20")
    terms = 41.2e6
    assert cost(model).multiplications == pytest.approx(terms, rel=0.01)
    convert_(model)
    result = cost(model)
    stem, head = 16 * 3 * 9 * 32 * 32, 64 * 10
    assert result.multiplications == stem + head
    assert result.additions == 2 * (cost_of_cnn(model) - stem - head) + stem + head


def cost_of_cnn(model):
    revert_(model)
    return cost(model).multiplications


def test_fully_converted_network_multiplies_only_in_the_head(tiny):
    model = tiny()
    convert_(model, AdderConfig(skip_first=False), example_input=IMAGE)
    assert cost(model, IMAGE).multiplications == 6 * 5


def test_layer_called_twice_costs_twice_and_is_stored_once():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    result = cost(nn.Sequential(conv, nn.ReLU(), conv), IMAGE)
    assert result.multiplications == 2 * 32 * 32 * 3 * 3 * 9
    assert result.parameters == result.layers[0].parameters == 3 * 3 * 9 + 3


def test_rows_are_in_order_of_execution(tiny):
    assert [layer.path for layer in cost(tiny(), IMAGE).layers] == ["stem", "grouped", "depthwise", "pointwise", "head"]


def test_one_image_is_counted_of_a_batch(tiny):
    assert cost(tiny(), torch.zeros(4, 3, 8, 8)) == cost(tiny(), torch.zeros(1, 3, 8, 8))


def test_to_dict_is_json(tiny):
    result = cost(tiny(), IMAGE)
    mapping = json.loads(json.dumps(result.to_dict()))
    assert mapping["multiplications"] == sum(layer["multiplications"] for layer in mapping["layers"])
    assert mapping["parameters"] == result.parameters
    assert mapping["layers"][0]["output_shape"] == [8, 32, 32]


def test_model_outside_timm_needs_an_example(tiny):
    with pytest.raises(AdderkitError, match="example_input"):
        cost(tiny())


def test_model_is_left_untouched(tiny, images, snapshot):
    model = tiny().train()
    before = snapshot(model)
    cost(model, images)
    assert snapshot(model) == before
