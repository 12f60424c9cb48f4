"""Whole networks: in integers they compute what their formulas say, and nearly what they did in floats."""

import copy

import pytest
import timm
import torch
from torch import nn

import adderkit
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.network import IntegerNetwork
from adderkit.adder_layers.integer.plan import Adder
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.errors import AdderkitError
from adderkit.convert.quantization.config import QuantizeConfig
from adderkit.convert.quantization.fake_quantize import FakeQuantized, compute_op
from adderkit.convert.quantization.fold import fold
from adderkit.convert.quantization.quantize import prepare_, quantize, quantize_with_ranges


@pytest.fixture
def images():
    return torch.randn(64, 3, 8, 8)


@pytest.fixture
def student(teacher, images):
    """``TinyNet`` with adder layers, statistics measured."""
    model = copy.deepcopy(teacher)
    adderkit.convert_(model, example_input=images[:1])
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    return model


def agreement(one, other):
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.parametrize("config", [{}, {"first_last": "fp32"}, {"bits": 6}, {"bits": 4}, {"requant": "shift"}])
@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_integers_nearly_do_what_floats_did(teacher, student, images, config, kind):
    model = student if kind == "adder" else teacher
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = quantize(model, images, QuantizeConfig(**config))
    assert isinstance(network, IntegerNetwork)
    with torch.no_grad():
        found, expected = network(images), model(images)
    least = {"bits": 0.9, "requant": 0.9}
    assert agreement(found, expected) > least.get(next(iter(config), ""), 0.995) - 0.1 * (config.get("bits") == 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_floating_point() for tensor in network.state_dict().values()) or "first_last" in config


@pytest.mark.parametrize("config", [{}, {"bits": 4}, {"first_last": "fp32"}, {"requant": "shift"}])
@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_integers_are_what_training_imitates(teacher, student, images, config, kind):
    """The same up to sums that fall on the boundary between two codes."""
    model = student if kind == "adder" else teacher
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    prepare_(model, [images], QuantizeConfig(**config))
    assert isinstance(model, FakeQuantized)
    network = quantize(model, images)
    with torch.no_grad():
        found, expected = network(images), model(images)
    step = float(expected.std()) * 0.02
    assert float(((found - expected).abs() > step).float().mean()) < 0.02


@pytest.mark.parametrize("config", [{}, {"bits": 4}, {"requant": "shift"}])
def test_several_terms(teacher, images, config):
    """Close to the floats, and to the bit what the reference gives."""
    model = copy.deepcopy(teacher)
    adderkit.convert_(model, adderkit.AdderConfig(terms={"grouped": 3, "*": 2}), example_input=images[:1])
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    network = quantize(model, images, QuantizeConfig(**config))
    assert [step.terms for step in network.plan.steps if isinstance(step, Adder)] == [3, 2, 2]
    with torch.no_grad():
        found, expected = network(images), model(images)
    assert agreement(found, expected) > (0.8 if config else 0.995)
    first = network.plan.activations[0]
    codes = reference.quantize(images, first.scale, first.zero_point)
    assert torch.equal(found, reference.run(network.plan, codes).float() * network.plan.steps[-1].scale)


@pytest.mark.parametrize(
    ("kind", "requant"),
    [("adder", "fixed"), ("adder", "shift"), ("cnn", "shift"), ("terms", "shift")],
)
def test_each_step_of_a_depthwise_network(kind, requant):
    """Given a step's bytes, the twin gives what the integers do. With random weights whole networks cannot be compared:
    they double the least difference in every block, in fp32 too.
    """
    model, images = timm.create_model("mobilenetv2_035", num_classes=5).eval(), torch.randn(16, 3, 32, 32)
    if kind != "cnn":
        terms = 2 if kind == "terms" else 1
        adderkit.convert_(model, adderkit.AdderConfig(terms=terms), example_input=images[:1])
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    prepare_(model, [images], QuantizeConfig(requant=requant))
    plan = fold(model)
    codes, logits = reference.trace(
        plan, reference.quantize(images[:2], plan.activations[0].scale, model.grid(0).zero_point)
    )
    values = {
        number: ((codes[number].double() - each.zero_point) * each.scale).float().permute(0, 3, 1, 2)
        for number, each in enumerate(plan.activations)
    }
    graph = model.fused_graph
    for op in graph.ops[:-1]:
        if graph.shapes[op.output][1:] == (1, 1):  # hardly a variance is left, and fp32's rounding is divided by it
            continue
        with torch.no_grad():
            found = model.quantize(op.output, compute_op(model, op, values))
        away = ((found - values[op.output]) / plan.activations[op.output].scale).abs().round()
        assert float(away.max()) <= 1  # sums on the boundary between two codes
        assert float(away.mean()) < 0.005
    found = compute_op(model, graph.ops[-1], values).flatten(1).detach()
    torch.testing.assert_close(found, logits * plan.steps[-1].scale, atol=1e-4 * float(found.abs().max()), rtol=0)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_one_layer_by_its_formula(terms):
    """Bytes of ``floor(y / step + 1/2)`` for the BatchNorm of minus the distances, computed in fp64."""
    torch.manual_seed(3)
    layer = adderkit.AdderConv2d(3, 4, 3, padding=1, terms=terms)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    model = nn.Sequential(layer, norm, nn.ReLU()).eval()
    images = torch.randn(32, 3, 6, 6)
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    prepare_(model, [images], QuantizeConfig())
    network = IntegerNetwork(fold(model))
    grid, target = model.grid(0), model.grid(1)
    x = grid.nearest(images, (-1, 1, 1)).double()
    weight, excess = grid.weights(layer.weight.detach(), 1)
    y = adder_conv2d_reference(x, weight.double(), layer.bias.detach().double(), 1, 1, 1, 1) - excess.view(-1, 1, 1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().view(-1, 1, 1)
    y = (y - norm.running_mean.double().view(-1, 1, 1)) * scale + norm.bias.double().view(-1, 1, 1)
    codes = (y / target.scale + 0.5).floor().clamp(0, 255)
    found = network(images).view_as(codes) / target.scale
    assert int((found.round() != codes).sum()) <= 2  # boundaries between codes
    assert len(codes.unique()) > 50


@pytest.mark.parametrize(
    ("name", "first_last", "terms"),
    [
        ("cifar_resnet20", "int8", None),
        ("cifar_resnet20", "fp32", None),
        ("cifar_resnet20", "int8", 2),
        ("cifar_vgg_small", "int8", None),
        ("cifar_vgg_small", "fp32", None),
    ],
)
def test_papers_networks(name, first_last, terms, tmp_path):
    size = (3, 16, 16)
    arguments = {"img_size": 16} if "vgg" in name else {}
    model = timm.create_model(name, pretrained_cfg_overlay={"input_size": size}, **arguments).eval()
    images = torch.randn(16, *size)
    if terms:
        adderkit.convert_(model, adderkit.AdderConfig(terms=terms), example_input=images[:1])
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    network = quantize(model, images, QuantizeConfig(first_last=first_last))
    with torch.no_grad():
        found, expected = network(images[:2]), model(images[:2])
    assert agreement(found, expected) > 0.9
    folder = adderkit.save(network, tmp_path / "net")
    again = adderkit.load(folder)
    timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(images[:2]), found)
    assert torch.equal(timms(images[:2]), found)


def test_ranges_are_told(student, images):
    _, ranges = quantize_with_ranges(student, images)
    assert [row.path for row in ranges][:3] == ["", "stem", "grouped"]
    assert all(row.low <= 0 <= row.high and 0 <= row.error < 0.1 for row in ranges)


def test_shifts_only_shift(student, images):
    network = quantize(student, images, QuantizeConfig(requant="shift"))
    for step in network.plan.steps:
        factors = getattr(step, "requantization", step)
        sizes = factors.multiplier.abs().double()
        exponent = sizes[sizes > 0].log2()
        assert torch.equal(exponent, exponent.round())


def test_a_network_of_integers_is_not_quantized_again(student, images):
    network = quantize(student, images)
    with pytest.raises(AdderkitError, match="is quantized and cannot be quantized again"):
        quantize(network, images)
    with pytest.raises(AdderkitError, match="cannot be calibrated"):
        adderkit.calibrate_(network, student, images)
    with pytest.raises(AdderkitError, match="cannot be pruned"):
        adderkit.prune_(network, adderkit.PruneConfig(0.5))


def test_a_network_that_is_trained_for_integers(student, images):
    """It costs what the float network costs, and its layers cannot be changed: its operations would not know."""
    expected = adderkit.cost(student, images)
    model = copy.deepcopy(student)
    prepare_(model, [images], QuantizeConfig())
    assert adderkit.cost(model, images) == expected
    assert isinstance(model, FakeQuantized)
    with pytest.raises(AdderkitError, match="is prepared for quantization-aware training and cannot be calibrated"):
        adderkit.calibrate_(model, student, images)
    with pytest.raises(AdderkitError, match="is prepared for quantization-aware training and cannot be pruned"):
        adderkit.prune_(model, adderkit.PruneConfig(0.5, importance="random"))


def test_the_class_says_what_it_was(student, images):
    """Also with another mixin in front, as FSDP2 puts one."""
    model = copy.deepcopy(student)
    prepare_(model, [images], QuantizeConfig())
    assert type(model).__name__ == f"FakeQuantized{type(student).__name__}"
    model.__class__ = type("Sharded", (type("Mixin", (), {}), type(model)), {})
    assert type(model.float_model()) is type(student)


class Averages(nn.Module):
    """What reads an average over ``size`` x ``size`` pixels, by ``form``."""

    def __init__(self, form, size):
        super().__init__()
        self.form = form
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool, self.last = nn.AvgPool2d(size, size), nn.AvgPool2d(size, size)
        self.layer, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        first = self.stem(x)
        found = self.pool(first)
        if self.form == "averaged again":
            return self.head(self.last(found).mean((2, 3)))
        if self.form == "sum of averages":
            found = found + self.last(first)
        layer = self.norm(self.layer(found))
        return self.head((layer + found if self.form == "residual" else layer).relu().mean((2, 3)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", ["layer", "residual", "averaged again", "sum of averages"])
def test_shifts_take_averages_or_refuse_them(form, size):
    model, images = Averages(form, size).eval(), torch.randn(64, 3, 18, 18)
    adderkit.convert.calibration.batchnorm.reestimate_batchnorm_(model, [images])
    if size == 3 and form in ("residual", "averaged again"):
        with pytest.raises(AdderkitError, match=r"averages over 9 pixels, which shifts alone cannot.*--requant fixed"):
            quantize(model, images, QuantizeConfig(requant="shift"))
        return
    with torch.no_grad():
        found, expected = quantize(model, images, QuantizeConfig(requant="shift"))(images), model(images)
    assert float((found - expected).norm() / (expected - expected.mean(0)).norm()) < 0.2


def test_too_few_images(student, images):
    with pytest.raises(AdderkitError, match="8 calibration images are too few, expected at least 16"):
        quantize(student, images[:8])


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"bits": 7}, "bits is 7, expected one of 8, 6, 5, 4"),
        ({"bits": True}, "bits is True"),
        ({"requant": "float"}, "requant is 'float', expected one of fixed, shift"),
        ({"first_last": "int4"}, "first_last is 'int4', expected one of int8, fp32"),
        ({"bit": 8}, "unknown key 'bit' in the quantization configuration; did you mean 'bits'?"),
        ({"version": 2}, "has version 2, expected 1"),
    ],
)
def test_wrong_settings(values, line):
    with pytest.raises(AdderkitError) as caught:
        QuantizeConfig.from_dict(values)
    assert line in str(caught.value)


def test_settings_come_back():
    config = QuantizeConfig(5, "shift", "fp32")
    assert QuantizeConfig.from_dict(config.to_dict()) == config
