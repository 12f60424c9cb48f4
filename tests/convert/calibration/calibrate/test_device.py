"""Calibration computes on the device of the models, with the same result as on the CPU."""

import copy

import pytest
import timm
import torch
from torch import nn

import adderkit
from adderkit.convert.calibration import layerwise
from adderkit.convert.calibration.hybrid import keep_convolutions_
from adderkit.convert.errors import AdderkitError

CONFIG = adderkit.CalibrationConfig(steps=2, samples=64, matching_steps=2)


@pytest.fixture(scope="module")
def images():
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    overlay = {"input_size": (3, 8, 8)}
    model = timm.create_model("cifar_resnet20", num_classes=4, pretrained_cfg_overlay=overlay).eval()
    model.features[5].conv1.bias = nn.Parameter(torch.randn(32))
    return model


@pytest.fixture
def student(teacher):
    model = copy.deepcopy(teacher)
    adderkit.convert_(model, adderkit.AdderConfig(include=("features.4.*", "features.5.*"), norm="insert"))
    return model


def state(model):
    return {name: value.cpu() for name, value in model.state_dict().items()}


def test_everything_is_computed_on_the_device(teacher, student, images, second_device, monkeypatch):
    expected, original = copy.deepcopy(student), copy.deepcopy(teacher)
    on_cpu = adderkit.calibrate_(expected, original, images, CONFIG)
    fitted = []

    def reconstruct(windows, target, *rest):
        fitted.extend({windows.device, target.device, rest[0].device})
        return original_reconstruct(windows, target, *rest)

    original_reconstruct = layerwise.reconstruct
    monkeypatch.setattr(layerwise, "reconstruct", reconstruct)
    report = adderkit.calibrate_(student.to(second_device), teacher.to(second_device), images, CONFIG)
    assert set(fitted) == {second_device}
    assert (on_cpu.device, report.device) == ("cpu", str(second_device))
    assert report.layers == on_cpu.layers
    assert {value.device for value in student.state_dict().values()} == {second_device}
    assert all(value.equal(state(expected)[name]) for name, value in state(student).items())

    paths = [report.layers[0].path]
    keep_convolutions_(expected, original, paths, images, CONFIG)
    keep_convolutions_(student, teacher, paths, images, CONFIG)
    assert all(value.equal(state(expected)[name]) for name, value in state(student).items())


def test_two_devices_are_refused(teacher, student, images, second_device):
    with pytest.raises(AdderkitError, match="the student is on lazy:0 and the teacher on cpu, expected one device"):
        adderkit.calibrate_(student.to(second_device), teacher, images, CONFIG)


def test_the_second_device_tells_a_mistake(second_device):
    layer = nn.Linear(3, 3).to(second_device)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        layer(torch.zeros(1, 3))
