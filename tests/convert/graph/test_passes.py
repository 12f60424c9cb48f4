"""Passes that continue from layer to layer, against one pass of the whole model up to each layer."""

import copy
import logging
import tempfile
from collections import Counter
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration import layerwise
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.calibration.sampling import layer_inputs
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.graph.layers import trace_layers
from adderkit.convert.graph.passes import SteppedPasses
from adderkit.convert.graph.stepwise import stepped_graph

FAST = CalibrationConfig(steps=2, samples=64, matching_steps=2, batch_size=8)
NETWORKS = {
    "residual blocks": ("cifar_resnet20", {}),
    "inverted residuals": ("mobilenetv2_035", {}),
    "concatenations": ("densenet121", {"growth_rate": 4, "block_config": (2, 2)}),
    "views of one tensor": ("res2net50_14w_8s", {"layers": (1, 1, 1, 1)}),
}


def network(name):
    architecture, arguments = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=4, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained: zero weights would hide a whole branch
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.eval()


def converted(teacher, include=("*",)):
    student = copy.deepcopy(teacher)
    convert_(student, AdderConfig(include=include), example_input=torch.zeros(1, 3, 32, 32))
    return student


@pytest.fixture
def images():
    return torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def passes_of(model, images, memory, folder=None):
    paths = list(adder_layers(model))
    layers = [layer.path for layer in trace_layers(model, images[:1]) if layer.path in paths]
    graph = stepped_graph(model, dict.fromkeys(layers, ()), images[:2])
    return layers, SteppedPasses(model, graph, images.split(8), memory, folder)


@pytest.mark.parametrize("memory", [0, 300_000, 1 << 40], ids=["files", "some in files", "memory"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_each_layer_receives_what_it_does_in_a_whole_pass(name, images, memory, tmp_path):
    model = converted(network(name))
    layers, passes = passes_of(model, images, memory, tmp_path)
    for index, path in enumerate(layers):
        module = model.get_submodule(path)
        expected = layer_inputs(model, path, images.split(8)) if index % 7 == 6 else [None] * 3
        for actual, wanted in zip(passes.inputs(path), expected, strict=True):
            assert wanted is None or torch.equal(actual, wanted), path
        module.weight.mul_(1.25)  # as a fit changes it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [1 << 20, 1 << 31])
def test_calibration_gives_the_same_bits_as_with_a_pass_for_each_layer(images, memory, monkeypatch):
    teacher = network("residual blocks")
    student, expected = (converted(teacher, ("features.[2345].*",)) for _ in range(2))
    settings = replace(FAST, memory=memory)
    report = calibrate_(student, teacher, images, settings)
    monkeypatch.setattr(layerwise, "stepped_graph", lambda *_: None)
    assert calibrate_(expected, teacher, images, settings) == report
    for name, value in student.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_each_module_runs_once(images):
    model, called = converted(network("residual blocks")), []
    layers, passes = passes_of(model, images, 1 << 40)
    for path, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda *_, path=path: called.append(path))
    for path in layers:
        list(passes.inputs(path))
    assert set(called) >= set(layers[:-1])
    assert max(Counter(called).values()) == 3  # batches


def test_without_space_for_files_passes_start_again(images, monkeypatch, caplog):
    model = converted(network("residual blocks"))
    layers, passes = passes_of(model, images, 0)

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with caplog.at_level(logging.WARNING):
        for path in layers[:3]:
            expected = layer_inputs(model, path, images.split(8))
            assert all(map(torch.equal, passes.inputs(path), expected))
    assert caplog.text.count("No space left on device") == 1
