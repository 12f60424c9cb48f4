"""Every kind of convolution: exact about padding and weight when it is converted, turned back, saved and replayed."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.mixed_conv2d import MixedConv2d
from timm.layers.padding import pad_same
from torch import nn

import adderkit
from adderkit.adder_layers.conv import AdderConv2d
from adderkit.adder_layers.modules import AdderConv2dSame, same_padding
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.calibration.sampling import windows_at
from adderkit.convert.checkpoint.replay import replay
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.converters import converter_of, fold_weight_
from adderkit.convert.conversion.plan import plan
from adderkit.convert.conversion.rewrite import convert_, revert_
from adderkit.convert.errors import CheckpointError
from adderkit.convert.record import transforms_of

IMAGE = torch.zeros(1, 3, 13, 11)
KINDS = {
    "Conv2dSame": lambda **kw: Conv2dSame(4, 6, 3, **kw),
    "StdConv2d": lambda **kw: StdConv2d(4, 6, 3, bias=True, **kw),
    "StdConv2dSame": lambda **kw: StdConv2dSame(4, 6, 3, eps=1e-3, **kw),
    "ScaledStdConv2d": lambda **kw: ScaledStdConv2d(4, 6, 3, gamma=1.7, **kw),
    "ScaledStdConv2dSame": lambda **kw: ScaledStdConv2dSame(4, 6, 3, gamma=1.7, **kw),
}


def network(conv):
    """A stem, the convolution in question, a normalization, a head."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), conv, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).append(nn.Linear(6, 2))


def seen_by(conv, x):
    """Padding and weight that a convolution really uses, recorded at ``F.conv2d``."""
    found, original = {}, F.conv2d

    def record(input, weight, bias, stride, padding, dilation, groups):
        found.update(input=input, weight=weight, bias=bias, padding=padding)
        return original(input, weight, bias, stride, padding, dilation, groups)

    F.conv2d = record
    try:
        conv(x)
    finally:
        F.conv2d = original
    return found


@pytest.mark.parametrize("stride", [1, 2, (2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_adder_sees_what_the_convolution_saw(kind, stride):
    conv = KINDS[kind](stride=stride).double()
    if hasattr(conv, "gain"):
        nn.init.uniform_(conv.gain, 0.5, 2)
    model, x = network(conv).double().eval(), torch.randn(2, 4, 13, 11).double()
    used = seen_by(conv, x)
    expected = adder_conv2d_reference(
        used["input"], used["weight"], used["bias"], conv.stride, used["padding"], conv.dilation, 1
    )
    convert_(model, AdderConfig(include=("2",)), example_input=IMAGE)
    assert isinstance(conv, AdderConv2d)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    assert set(dict(conv.named_parameters())) == ({"weight"} if conv.bias is None else {"weight", "bias"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_turned_back_it_computes_the_same(kind, dtype):
    model = network(KINDS[kind]()).eval().to(dtype)
    image = torch.randn(2, 3, 13, 11, dtype=dtype)
    expected = model(image)
    convert_(model, example_input=IMAGE)
    assert revert_(model) == 1
    assert type(model[2]) in (nn.Conv2d, Conv2dSame)
    assert torch.equal(model(image), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_before_and_after_turning_back(kind):
    model, image = network(KINDS[kind]()).eval(), torch.randn(2, 3, 13, 11)
    convert_(model, example_input=IMAGE)
    for _ in range(2):
        fresh = network(KINDS[kind]()).eval()
        replay(json.loads(json.dumps(transforms_of(model))), lambda fresh=fresh: fresh)
        assert type(fresh[2]) is type(model[2])
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(image), model(image))
        if isinstance(model[2], AdderConv2d):
            revert_(model)


def test_baked_turned_back_and_converted_again():
    model = network(StdConv2d(4, 6, 3)).eval()
    convert_(model, example_input=IMAGE)
    revert_(model)
    assert [transform["kind"] for transform in transforms_of(model)] == ["plain"]
    convert_(model, example_input=IMAGE)
    assert [transform["kind"] for transform in transforms_of(model)] == ["plain", "adder"]
    fresh = network(StdConv2d(4, 6, 3)).eval()
    replay(transforms_of(model), lambda: fresh)
    fresh.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 13, 11)
    assert torch.equal(fresh(image), model(image))


@pytest.mark.parametrize("conv", [StdConv2d(4, 6, 3), nn.Conv2d(4, 6, 3, padding=1)], ids=["StdConv2d", "Conv2d"])
def test_record_that_lies_about_baking_is_refused(conv):
    model = network(conv)
    lie = [] if isinstance(conv, StdConv2d) else ["2"]
    with pytest.raises(CheckpointError, match="folded is"):
        replay([{"kind": "adder", "version": 1, "modules": ["2"], "folded": lie}], lambda: model)
    assert type(model[2]) is type(conv)


def test_plain_step_needs_a_transformed_weight():
    with pytest.raises(CheckpointError, match="is a Conv2d"):
        replay([{"kind": "plain", "version": 1, "modules": ["2"]}], lambda: network(nn.Conv2d(4, 6, 3)))


@pytest.mark.parametrize("size", [(13, 11), (8, 9), (7, 7)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), ((5, 3), (2, 3), 1), (3, 1, 2), (1, 2, 1), (2, 1, 1)]
)
def test_same_padding_is_timm_s(size, kernel, stride, dilation):
    layer = Conv2dSame(1, 1, kernel, stride, dilation=dilation)
    x = torch.randn(1, 1, *size)
    assert torch.equal(
        F.pad(x, same_padding(size, layer)), pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
    )


def test_windows_of_a_layer_that_pads_by_size():
    layer = AdderConv2dSame(4, 6, 3, stride=2).double()
    x = torch.randn(2, 4, 7, 9).double()
    output = layer(x)
    positions = torch.arange(output.shape[2] * output.shape[3]).expand(2, -1)
    windows = windows_at(x, layer, positions)  # [1, N · P, K]
    expected = -(windows[0][:, None] - layer.weight.flatten(1)).abs().sum(2)
    torch.testing.assert_close(output.flatten(2).transpose(1, 2).flatten(0, 1), expected)


def test_baking_keeps_the_parameter_object():
    conv = ScaledStdConv2d(4, 6, 3)
    parameter = conv.weight
    fold_weight_(conv, converter_of(type(conv)))
    assert conv.weight is parameter
    assert not hasattr(conv, "gain")


def test_mixed_convolutions_convert_one_by_one():
    model = network(MixedConv2d(4, 6, [3, 5]))
    found = {row.path: row for row in plan(model, example_input=IMAGE).rows}
    assert [path for path in found if path.startswith("2.")] == ["2.0", "2.1"]
    assert all(found[path].inserted for path in ("2.0", "2.1"))


def test_conditional_convolution_is_listed_and_skipped():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.routed, self.norm = CondConv2d(4, 6, 3), nn.BatchNorm2d(6)
            self.conv, self.norm1, self.head = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.norm0(self.stem(x))
            x = self.norm(self.routed(x, torch.full((len(x), 4), 0.25, device=x.device)))
            return self.head(self.norm1(self.conv(x)).mean((2, 3)))

    row = plan(Routed(), example_input=IMAGE).rows[1]
    assert (row.path, row.decision) == ("routed", "skip")
    assert row.reason == "CondConv2d mixes its filters for each image"
    assert row.products == 6 * 11 * 9 * 4 * 9


def test_shared_parameter_keeps_both_convolutions():
    model = network(nn.Conv2d(4, 6, 3))
    model.insert(4, nn.Conv2d(6, 6, 1)).insert(5, nn.BatchNorm2d(6))
    model.insert(6, nn.Conv2d(6, 6, 1)).insert(7, nn.BatchNorm2d(6))
    model[6].weight = model[4].weight
    reasons = {row.path: row.reason for row in plan(model, example_input=IMAGE).rows}
    assert reasons["4"] == "shares its weight with '6'"
    assert reasons["6"] == "shares its weight with '4'"


@pytest.mark.parametrize("name", ["test_nfnet", "test_efficientnet_evos"])
def test_timm_models_there_and_back(name, tmp_path):
    model = timm.create_model(name).eval()
    image = torch.randn(2, 3, 160, 160)
    original, before = model(image), copy.deepcopy(model)
    convert_(model)
    assert torch.equal(adderkit.load(adderkit.save(model, tmp_path / "adder"))(image), model(image))
    revert_(model)
    assert torch.equal(model(image), original)
    assert torch.equal(adderkit.load(adderkit.save(model, tmp_path / "plain"))(image), before(image))
