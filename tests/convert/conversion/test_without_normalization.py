"""Networks without any BatchNorm, as VGG is: ``norm`` inserts, skips or refuses, and what is inserted is calibrated."""

import copy

import pytest
import torch
from timm.models.vgg import VGG
from torch import nn

import adderkit
from adderkit.adder_layers.modules import NormalizedAdderConv2d, adder_layers
from adderkit.convert.errors import AdderkitError, NoModuleMatchedError

IMAGE = torch.zeros(1, 3, 16, 16)


class SmallVGG(nn.Sequential):
    """Convolutions and ReLU alone, as in ``torchvision.models.vgg16``."""

    def __init__(self):
        convolutions = [nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 8), (8, 8), (8, 16), (16, 16))]
        first, second, third, fourth = ([layer, nn.ReLU()] for layer in convolutions)
        features = [*first, *second, nn.MaxPool2d(2), *third, *fourth, nn.MaxPool2d(2)]
        super().__init__(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))


@pytest.fixture
def vgg():
    torch.manual_seed(0)
    model = SmallVGG().eval()
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def test_error_names_the_layer_and_changes_nothing(vgg, snapshot):
    before = snapshot(vgg)
    with pytest.raises(AdderkitError, match=r"'2' would be converted to adder, but no normalization follows, but ReLU"):
        adderkit.convert_(vgg, adderkit.AdderConfig(norm="error"), example_input=IMAGE)
    assert snapshot(vgg) == before


def test_skip_leaves_nothing_and_says_so(vgg):
    with pytest.raises(NoModuleMatchedError, match=r"none of 4 convolutions can be converted: first.*ReLU '3'"):
        adderkit.convert_(vgg, adderkit.AdderConfig(norm="skip"), example_input=IMAGE)


def test_insert_is_calibrated(vgg):
    """An inserted normalization takes the mean and variance of the convolution, per channel."""
    student, images = copy.deepcopy(vgg), torch.randn(64, 3, 16, 16)
    adderkit.convert_(student, adderkit.AdderConfig(norm="insert"), example_input=IMAGE)
    layers = adder_layers(student)
    assert list(layers) == ["2", "5", "7"]
    assert all(type(layer) is NormalizedAdderConv2d and layer.bias is None for layer in layers.values())
    report = adderkit.calibrate_(student, vgg, images, adderkit.CalibrationConfig(10, 512, 0))
    assert min(layer.correlation for layer in report.layers) > 0.5
    first = vgg[1](vgg[0](images))  # up to the first layer that was converted
    found, wanted = student[2](first), vgg[2](first)
    for statistic, tolerance in ((lambda y: y.mean((0, 2, 3)), 0.1), (lambda y: y.std((0, 2, 3)), 0.1)):
        torch.testing.assert_close(statistic(found), statistic(wanted), atol=tolerance, rtol=tolerance)
    assert float((student(images) - vgg(images)).std() / vgg(images).std()) < 1


def test_timm_vgg():
    model = VGG([8, "M", 8, 8, "M"], num_classes=3, mlp_ratio=0.01).eval()
    rows = {row.path: row for row in adderkit.plan(model, example_input=torch.zeros(1, 3, 32, 32)).rows}
    assert [path for path, row in rows.items() if row.inserted] == [
        "features.3",
        "features.5",
        "pre_logits.fc1",
        "pre_logits.fc2",
    ]
