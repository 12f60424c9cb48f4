"""A BatchNorm of its own: where it is inserted, what calibration makes of it, and how it leaves no trace."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import LayerNorm2d
from torch import nn

import adderkit
from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import NormalizedAdderConv2d, sharp_gradient
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.checkpoint.replay import replay
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.plan import plan
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.record import transforms_of

IMAGE = torch.zeros(1, 3, 16, 16)


class Plain(nn.Module):
    """A network without any normalization; its middle layers are called by functions."""

    def __init__(self, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=bias, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + F.relu(self.first(x))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("bias", [True, False])
def test_output_is_the_normalized_formula(bias):
    model = Plain(bias).double().eval()
    bias_before = None if not bias else model.first.bias.detach().clone()
    made = convert_(model, example_input=IMAGE)
    assert [row.path for row in made.rows if row.inserted] == ["first", "second"]
    norm = model.first.normalization
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    x = torch.randn(2, 8, 6, 6).double()
    raw = adder_conv2d_reference(x, model.first.weight, None, (1, 1), (1, 1), (1, 1), 1)
    mean, deviation = norm.running_mean[:, None, None], (norm.running_var + norm.eps).sqrt()[:, None, None]
    expected = (raw - mean) / deviation
    if bias:
        expected = expected + bias_before[:, None, None]
    torch.testing.assert_close(model.first(x), expected)
    assert model.first.bias is None


@pytest.mark.parametrize("bias", [True, False])
def test_turned_back_it_is_the_original(bias):
    model = Plain(bias).eval()
    image = torch.randn(2, 3, 16, 16)
    expected, keys = model(image), list(model.state_dict())
    convert_(model, example_input=IMAGE)
    assert set(keys) - set(model.state_dict()) == ({"first.bias", "second.bias"} if bias else set())
    assert revert_(model) == 2
    assert torch.equal(model(image), expected)
    assert set(model.state_dict()) == set(keys)
    assert transforms_of(model) == []


def test_replay_inserts_again():
    model = Plain().eval()
    convert_(model, example_input=IMAGE)
    fresh, image = Plain().eval(), torch.randn(2, 3, 16, 16)
    replay(json.loads(json.dumps(transforms_of(model))), lambda: fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(image), model(image))
    revert_(fresh)
    assert fresh.first.bias is not None


def test_record_that_normalizes_something_else_is_refused():
    with pytest.raises(CheckpointError, match="normalized is"):
        replay([{"kind": "adder", "version": 1, "modules": ["first"], "normalized": ["second"]}], Plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_normalization_follows_dtype_mode_and_device(dtype):
    model = Plain().to("meta", dtype).train()
    convert_(model, example_input=IMAGE)
    assert model.first.normalization.weight.dtype == dtype
    assert model.first.normalization.weight.is_meta
    assert model.first.normalization.training


def test_calibration_keeps_mean_and_variance_of_the_convolution():
    teacher = Plain().eval()
    student, images = copy.deepcopy(teacher), torch.randn(64, 3, 16, 16)
    convert_(student, example_input=IMAGE)
    report = adderkit.calibrate_(student, teacher, images, CalibrationConfig(steps=20, samples=8192, matching_steps=0))
    assert min(layer.correlation for layer in report.layers) > 0.8
    x = F.relu(teacher.stem(images))
    expected, found = teacher.first(x), student.first(x)
    torch.testing.assert_close(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.std((0, 2, 3)), expected.std((0, 2, 3)), rtol=0.05, atol=0.02)
    agreement = torch.corrcoef(torch.stack([student(images).flatten(), teacher(images).flatten()]))[0, 1]
    assert agreement > 0.8


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(4, 16), lambda: LayerNorm2d(16)], ids=["GroupNorm", "LayerNorm2d"]
)
def test_calibrated_behind_a_norm_of_all_channels(norm):
    torch.manual_seed(0)
    body = [part for width in (3, 16, 16) for part in (nn.Conv2d(width, 16, 3), norm(), nn.ReLU())]
    teacher, images = nn.Sequential(*body[:-1]).eval(), torch.randn(64, 3, 12, 12)
    error = {}
    for choice in ("insert", "skip"):
        student = copy.deepcopy(teacher)
        convert_(student, AdderConfig(norm=choice, skip_last=False), example_input=images[:1])
        adderkit.calibrate_(student, teacher, images, CalibrationConfig(steps=20, samples=4096, matching_steps=0))
        with torch.no_grad():
            expected = teacher(images)
            error[choice] = float((student(images) - expected).square().mean() / expected.var())
    assert error["insert"] < 0.25 < 0.5 < error["skip"]


def test_norm_error_names_layer_and_remedy():
    with pytest.raises(AdderkitError, match=r"'first' would be converted to adder.*relu\(\).*--norm"):
        plan(Plain(), AdderConfig(norm="error"), example_input=IMAGE)


def test_norm_error_says_nothing_of_what_stays():
    config = AdderConfig(norm="error", exclude=("first", "second"), skip_first=False)
    with pytest.raises(AdderkitError, match="'stem'"):
        plan(Plain(), config, example_input=IMAGE)


def test_gates_are_skipped_unless_asked_for():
    model = torchvision.models.mobilenet_v3_small().eval()
    image = torch.zeros(1, 3, 64, 64)
    found = {row.path: row for row in plan(model, example_input=image).rows}
    gates = [path for path in found if path.endswith(("fc1", "fc2"))]
    assert len(gates) == 18
    assert {found[path].reason for path in gates} == {"on a 1x1 map without normalization, as in a gate"}
    asked = {row.path: row for row in plan(model, AdderConfig(skip_gates=False), example_input=image).rows}
    assert all(asked[path].inserted for path in gates)


def test_skip_depthwise():
    model = torchvision.models.mobilenet_v2()
    rows = plan(model, AdderConfig(skip_depthwise=True), example_input=torch.zeros(1, 3, 64, 64)).rows
    assert {row.reason for row in rows if row.groups > 1} == {"depthwise"}
    assert any(row.groups > 1 and row.decision == "convert" for row in plan(model, example_input=IMAGE).rows)


def test_layers_of_this_kind_are_adder_layers():
    model = Plain()
    convert_(model, example_input=IMAGE)
    assert isinstance(model.first, NormalizedAdderConv2d)
    again = plan(model, example_input=IMAGE)
    assert again.paths("converted") == ["first", "second"]
    assert not any(row.inserted for row in again.rows)


def test_sharp_gradient_restores_mode_and_sharpness():
    plain, own = AdderConv2d(2, 3, 3).eval(), AdderConv2d(2, 3, 3)
    own.sharpness = 4.0
    with sharp_gradient([plain, own], 1024.0):
        assert plain.sharpness == own.sharpness == 1024.0
        assert plain.training
        assert own.training
    assert (plain.sharpness, own.sharpness) == (1.0, 4.0)
    assert "sharpness" not in vars(plain)
    assert not plain.training
    assert own.training


def test_sharp_gradient_is_nearly_the_sign():
    layer = AdderConv2d(2, 3, 1).eval()
    input = torch.randn(4, 2, 5, 5, requires_grad=True)
    with sharp_gradient([layer], 1024.0):
        layer(input).sum().backward()
    signs = torch.sign(layer.weight[None] - input.detach()[:, None]).sum(1)
    assert (input.grad - signs).abs().mean() < 0.05
