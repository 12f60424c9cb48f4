"""Narrowed layers beside slices taken by hand; the record of their shapes, and hostile ones."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adderkit
from adderkit import AdderConv2d, PruneConfig
from adderkit.convert.checkpoint.replay import replay
from adderkit.convert.errors import CheckpointError
from adderkit.convert.files import sha256
from adderkit.convert.pruning.surgery import Kept, narrow_, prune_transform, shape_of, target_at


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = AdderConv2d(8, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.norm = nn.LayerNorm(6)
        self.act = nn.PReLU(6)
        self.scale = nn.Parameter(torch.randn(6, 1, 1), requires_grad=False)
        self.head = nn.Linear(6, 5)


def test_each_kind_is_narrowed_to_what_stays():
    model = Mixed()
    before = copy.deepcopy(model)
    outputs, inputs = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2, 4, 7])
    parts = {"grouped": Kept(outputs, inputs), "head": Kept(inputs=outputs)}
    narrow_(model, {**parts, **{path: Kept(outputs) for path in ("depthwise", "norm", "act", "scale")}})
    grouped = before.grouped.weight
    assert model.grouped.weight[1].equal(grouped[2][[1, 2]])
    assert model.grouped.weight[2].equal(grouped[3][[0, 3]])  # the second group reads channels 4 to 7
    assert model.grouped.bias.equal(before.grouped.bias[outputs])
    assert shape_of(model.grouped) == (4, 4, 2)
    assert shape_of(model.depthwise) == (4, 4, 4)
    assert model.depthwise.weight.equal(before.depthwise.weight[outputs])
    assert model.norm.weight.shape == (4,) == model.norm.normalized_shape
    assert model.act.num_parameters == 4
    assert model.scale.equal(before.scale[outputs])
    assert not model.scale.requires_grad
    assert model.head.weight.equal(before.head.weight[:, outputs])
    model.depthwise(model.grouped(torch.randn(1, 4, 6, 6)))  # runs

    transform = prune_transform(model, [*parts, "depthwise", "norm", "act", "scale"], {})
    fresh = replay([json.loads(json.dumps(transform))], Mixed)
    fresh.load_state_dict(model.state_dict())
    assert [shape_of(target_at(fresh, path)) for path in ("grouped", "depthwise", "head")] == [
        shape_of(target_at(model, path)) for path in ("grouped", "depthwise", "head")
    ]


def test_all_terms_of_a_weight_are_narrowed():
    """What remains computes what the whole layer computed from inputs that the removed channels do not tell apart."""
    layer = AdderConv2d(8, 6, 3, groups=2, terms=3)
    model = nn.ModuleDict({"layer": layer})
    before = layer.weight.detach().clone()
    outputs, inputs = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2, 4, 7])
    x = torch.randn(2, 8, 5, 5)
    x[:, [0, 3, 5, 6]] = 0
    expected = layer(x)[:, outputs].detach()
    narrow_(model, {"layer": Kept(outputs, inputs)})
    assert layer.weight.shape == (4, 2, 3, 3, 3)
    assert layer.weight[1].equal(before[2][[1, 2]])
    assert layer.weight[2].equal(before[3][[0, 3]])  # the second group reads channels 4 to 7
    removed = torch.stack([before[o][[0, 3]] if o < 3 else before[o][[1, 2]] for o in outputs.tolist()])
    constant = (removed.abs().sum((1, 3, 4)) * torch.tensor([1, 0.5, 0.25])).sum(1)
    torch.testing.assert_close(layer(x[:, inputs]) - constant[:, None, None], expected, rtol=1e-4, atol=1e-4)


GOOD = {"kind": "prune", "version": 1}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"kind": "prune", "version": 2, "shapes": {}}, "version 2"),
        (GOOD, "shapes is None"),
        ({**GOOD, "shapes": {}}, "shapes is {}"),
        ({**GOOD, "shapes": [["head", [5, 3]]]}, "shapes is"),
        ({**GOOD, "shapes": {"nothing": [4]}}, "does not exist"),
        ({**GOOD, "shapes": {"": [4]}}, "does not exist"),
        ({**GOOD, "shapes": {"head.weight.data": [4]}}, "does not exist"),
        ({**GOOD, "shapes": {"__class__": [4]}}, "does not exist"),
        ({**GOOD, "shapes": {"head": [5]}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": [5, -3]}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": [5, 0]}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": [5, 7]}}, "at most"),
        ({**GOOD, "shapes": {"head": [5, 10**30]}}, "at most"),
        ({**GOOD, "shapes": {"head": [5, 3.0]}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": [5, True]}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": "53"}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"head": None}}, "shape of 'head'"),
        ({**GOOD, "shapes": {"depthwise": [4, 4, 2]}}, "three equal"),
        ({**GOOD, "shapes": {"grouped": [4, 4, 1]}}, "2 groups"),
        ({**GOOD, "shapes": {"grouped": [3, 4, 2]}}, "2 groups"),
        ({**GOOD, "shapes": {"scale": [6, 1, 1]}}, "one size smaller"),
    ],
)
def test_hostile_records_are_refused(transform, message):
    model = Mixed()
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        replay([transform], lambda: model)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == before


@pytest.fixture
def pruned_folder(tmp_path, resnet20):
    model = resnet20()
    adderkit.prune_(model, PruneConfig(ratio=0.5, importance="magnitude"))
    return adderkit.save(model, tmp_path / "pruned")


def changed(folder, change):
    """Change the configuration, and the record in the weights with it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["model_args"]["transforms"])
    path.write_text(json.dumps(config))
    return config["model_args"]["transforms"]


def test_a_folder_whose_transforms_are_not_its_weights_is_refused(pruned_folder):
    changed(pruned_folder, lambda transforms: transforms[0]["shapes"].update({"fc": [10, 31, 1]}))
    with pytest.raises(CheckpointError, match=r"the transforms in .* differ from those in"):
        adderkit.load(pruned_folder)


def test_shapes_are_compared_with_those_of_the_weights(pruned_folder):
    """Also where the record in the weights, and their checksum, were changed along."""
    transforms = changed(pruned_folder, lambda transforms: transforms[0]["shapes"].update({"fc": [10, 31, 1]}))
    weights, config = pruned_folder / "model.safetensors", pruned_folder / "config.json"
    save_file(load_file(weights), weights, {"adderkit": json.dumps({"version": 1, "transforms": transforms})})
    described = json.loads(config.read_text())
    described["adderkit"]["sha256"] = sha256(weights)
    config.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"fc.weight has shape \[10, 32, 1, 1\].*expected \[10, 31, 1, 1\]"):
        adderkit.load(pruned_folder)


def test_a_pruned_folder_is_timms_own_and_has_a_fresh_head_on_demand(pruned_folder):
    model = timm.create_model(f"local-dir:{pruned_folder}", pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    assert model(images).equal(adderkit.load(pruned_folder)(images))
    assert model.num_features == 32 == model.fc.in_channels
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
