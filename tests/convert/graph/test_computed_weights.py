"""Layers whose weight something else computes stay convolutions, with the reason and the remedy."""

import copy
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import adderkit
from adderkit.adder_layers.conv import AdderConv2d
from adderkit.convert.errors import AdderkitError

IMAGE = torch.zeros(1, 3, 8, 8)
CALIBRATION = adderkit.CalibrationConfig(2, 64, 1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def without_parameter(layer):
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


def replaced_forward(layer):
    layer.forward = types.MethodType(nn.Conv2d.forward, layer)


COMPUTED = {
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"a mask .*prune\.remove\(layer, 'weight'\)"),
    "masks": (
        lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.5), "weight", 1),
        r"a mask .*prune\.remove\(layer, 'weight'\)",
    ),
    "masked bias": (
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        r"its bias .*prune\.remove\(layer, 'bias'\)",
    ),
    "weight_norm hook": (weight_norm, r"weight_norm; fix it with torch\.nn\.utils\.remove_weight_norm"),
    "spectral_norm hook": (spectral_norm, r"spectral_norm; fix it with torch\.nn\.utils\.remove_spectral_norm"),
    "weight_norm": (parametrizations.weight_norm, r"a parametrization; .*remove_parametrizations\(layer, 'weight'\)"),
    "spectral_norm": (parametrizations.spectral_norm, "by a parametrization"),
    "orthogonal": (parametrizations.orthogonal, "by a parametrization"),
    "own": (lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()), "by a parametrization"),
    "buffer": (without_parameter, "its weight is not a parameter"),
    "forward": (replaced_forward, r"its forward\(\) was replaced"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_stay(kind, tiny, images):
    change, reason = COMPUTED[kind]
    model = tiny()
    change(model.grouped)
    made = adderkit.plan(model, example_input=IMAGE)
    row = next(row for row in made.rows if row.path == "grouped")
    assert row.decision == "skip"
    assert re.search(reason, row.reason)
    expected = model.grouped(torch.ones(1, 8, 8, 8))
    adderkit.convert_(model, made)
    assert torch.equal(model.grouped(torch.ones(1, 8, 8, 8)), expected)
    assert isinstance(model.pointwise, AdderConv2d)


def test_a_mask_that_is_fixed_converts_with_the_masked_weight(tiny):
    model, twin = tiny(), tiny()
    twin.load_state_dict(model.state_dict())
    prune.l1_unstructured(model.grouped, "weight", 0.5)
    masked = model.grouped.weight.detach().clone()
    prune.remove(model.grouped, "weight")
    adderkit.convert_(model, example_input=IMAGE)
    assert torch.equal(model.grouped.weight, masked)
    twin.grouped.weight.data.copy_(masked)
    adderkit.calibrate_(model, twin, torch.randn(16, 3, 8, 8), CALIBRATION)
    fitted = model.grouped.weight.detach().clone()
    model(IMAGE)
    assert torch.equal(model.grouped.weight, fitted)


@pytest.mark.parametrize("write", ["copy", "data", "attribute"])
def test_a_pre_hook_that_sets_the_weight_is_found_before_the_fit(write, tiny):
    model, source = tiny(), nn.Parameter(torch.ones(8, 4, 3, 3))

    def hook(layer, _):
        if write == "copy":
            layer.weight.data.copy_(source)
        elif write == "data":
            layer.weight.data = source.detach().clone()
        else:
            layer.weight = source

    adderkit.convert_(model, example_input=IMAGE)
    model.grouped.register_forward_pre_hook(hook)
    with pytest.raises(AdderkitError, match="a forward pre-hook of 'grouped' sets its weight"):
        adderkit.calibrate_(model, tiny(), torch.randn(16, 3, 8, 8), CALIBRATION)


def test_hooks_that_look_are_kept(tiny):
    model, teacher, seen = tiny(), tiny(), []
    model.grouped.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.grouped.register_forward_hook(lambda *_: seen.append("after"))
    weight = model.grouped.weight.detach().clone()
    adderkit.convert_(model, example_input=IMAGE)
    assert torch.equal(model.grouped.weight, weight)
    adderkit.calibrate_(model, teacher, torch.randn(16, 3, 8, 8), CALIBRATION)
    seen.clear()
    model(IMAGE)
    assert seen == ["before", "after"]


class Adapted(nn.Module):
    """A convolution with a low-rank update, as peft wraps it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_adapters_are_merged_first(tiny):
    model = tiny()
    model.pointwise = Adapted(model.pointwise)
    rows = {row.path: row for row in adderkit.plan(model, example_input=IMAGE).rows}
    assert rows["pointwise.base_layer"].decision == "skip"
    assert "peft's merge_and_unload()" in rows["pointwise.base_layer"].reason


class Tied(nn.Module):
    """A decoder that uses the encoder's weight, transposed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.encoder, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.plain, self.plain_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.last(self.plain_norm(self.plain(self.norm(self.encoder(self.stem(x))))))
        return F.conv_transpose2d(x.to(self.plain.weight.dtype), self.encoder.weight)


def test_a_weight_that_something_else_reads_stays():
    rows = {row.path: row for row in adderkit.plan(Tied(), example_input=IMAGE).rows}
    assert rows["encoder"].reason == "its weight is also read by conv_transpose2d() outside of the layer"
    assert rows["plain"].decision == "convert"  # only its dtype is asked for


def test_what_cannot_be_rebuilt_is_not_saved(resnet20, tmp_path):
    model = resnet20()
    prune.l1_unstructured(model.features[1].conv1, "weight", 0.5)
    adderkit.convert_(model)
    with pytest.raises(AdderkitError, match=r"'features\.1\.conv1' cannot be rebuilt by timm.*prune\.remove"):
        adderkit.save(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3)], "it has 2 Conv1d, 1 BatchNorm1d"),
        ([nn.Conv3d(3, 4, 1)], "it has 1 Conv3d"),
        ([nn.ConvTranspose2d(3, 4, 3), nn.ReLU()], "it has 1 ConvTranspose2d, 1 ReLU"),
        ([nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)], "it has 2 Linear, 1 GELU"),
        ([nn.Identity()], "it has 1 Identity"),
    ],
)
def test_models_without_2d_convolutions_say_what_they_have(layers, found):
    shape = {nn.Conv1d: (1, 3, 8), nn.Conv3d: (1, 3, 4, 4, 4)}.get(type(layers[0]), (1, 3, 8, 8))
    with pytest.raises(AdderkitError, match=f"the model runs no Conv2d, which adder layers replace; {found}"):
        adderkit.plan(nn.Sequential(*layers), example_input=torch.zeros(shape))


def test_lazy_layers_are_run_first():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(AdderkitError, match=r"'0\.weight' has no shape yet.*run it once"):
        adderkit.plan(model, example_input=IMAGE)
    assert isinstance(model[0], nn.LazyConv2d)


def test_convolutions_that_do_not_run_are_named(tiny, caplog):
    model = tiny()
    model.auxiliary = nn.Conv2d(8, 8, 1)
    adderkit.plan(model, example_input=IMAGE)
    assert "'auxiliary' does not run in evaluation mode, and stays a convolution" in caplog.text


def test_a_frozen_layer_stays_frozen_with_its_normalization():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).requires_grad_(False)
    adderkit.convert_(model, example_input=IMAGE)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_another_network_as_teacher_is_noticed(tiny, caplog):
    model = tiny()
    teacher = copy.deepcopy(model)
    adderkit.convert_(model, example_input=IMAGE)
    adderkit.calibrate_(model, teacher, torch.randn(16, 3, 8, 8), CALIBRATION)
    assert not caplog.records
    adderkit.calibrate_(model, tiny(), torch.randn(16, 3, 8, 8), CALIBRATION)
    assert "the teacher has other weights in every layer that was not converted, such as 'stem'" in caplog.text
