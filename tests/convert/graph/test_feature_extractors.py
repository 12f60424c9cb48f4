"""Tools that trace a network for its intermediate outputs work on a converted one as on the CNN."""

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, FeatureHookNet
from timm.models._features import FeatureListNet
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import adderkit
from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import adder_layers

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4).eval()
    adderkit.convert_(network, example_input=IMAGES)
    return network


def outputs_of(model, paths):
    found = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(output.detach().clone()))
        for path in paths
    ]
    model(IMAGES)
    for handle in handles:
        handle.remove()
    return found


def test_torchvision_names_adder_layers_as_convolutions(model):
    cnn = timm.create_model("test_resnet", num_classes=4).eval()
    assert get_graph_node_names(model) == get_graph_node_names(cnn)


def test_torchvision_extracts_the_output_of_adder_layers(model):
    paths = ["layer1.0.conv1", "layer2"]
    expected = outputs_of(model, paths)
    extractor = create_feature_extractor(model, paths)
    assert isinstance(extractor.get_submodule("layer1.0.conv1"), AdderConv2d)  # trained and calibrated as such
    for found, wanted in zip(extractor(IMAGES).values(), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("net", [FeatureListNet, FeatureHookNet, FeatureGraphNet])
def test_timm_extracts_features(model, net):
    expected = outputs_of(model, ["layer1", "layer2", "layer3"])
    model.feature_info = [info for info in model.feature_info if info["module"].startswith("layer")]
    extractor = net(model, out_indices=(0, 1, 2))
    assert adder_layers(extractor)
    for found, wanted in zip(extractor(IMAGES), expected, strict=True):
        assert torch.equal(found, wanted)
