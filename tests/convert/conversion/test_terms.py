"""Conversions to adder layers with several terms: plan, layers, record, saved folders, and the way back."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import StdConv2d
from torch import nn

import adderkit
from adderkit import AdderConfig
from adderkit.adder_layers.modules import adder_layers
from adderkit.adder_layers.reference import adder_conv2d_reference
from adderkit.convert.checkpoint.replay import checked_transforms, replay
from adderkit.convert.conversion.transforms import restore_convolution_
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.record import transforms_of

TERMS = {"features.1.*": 3, "features.2.conv2": 2}
SEVERAL = {"features.1.conv1": 3, "features.1.conv2": 3, "features.2.conv2": 2}
INCLUDE = ("features.1.*", "features.2.*")


def cnn():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", pretrained_cfg_overlay={"input_size": (3, 16, 16)}).eval()


@pytest.fixture
def teacher():
    return cnn()


@pytest.fixture
def student(teacher):
    model = copy.deepcopy(teacher)
    adderkit.convert_(model, AdderConfig(include=INCLUDE, terms=TERMS))
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16)


def test_plan_and_layers_have_the_terms(teacher, student):
    made = adderkit.plan(teacher, AdderConfig(include=INCLUDE, terms=TERMS))
    planned = {row.path: row.terms for row in made.rows if row.decision == "convert"}
    assert planned == {path: layer.terms for path, layer in adder_layers(student).items()}
    assert {path: terms for path, terms in planned.items() if terms > 1} == SEVERAL
    assert all(row.terms == 1 for row in made.rows if row.decision == "skip")
    assert "BatchNorm2d, 3 terms" in str(made)
    assert {row.path: row.terms for row in adderkit.plan(student).rows if row.decision == "converted"} == planned


def test_all_terms_start_with_the_weight_of_the_convolution(teacher, student, images):
    layer = student.features[1].conv1
    weight = teacher.features[1].conv1.weight
    assert all(torch.equal(term, weight) for term in layer.weight.unbind(2))
    x = images[:, :1].expand(-1, 16, -1, -1)
    expected = 1.75 * adder_conv2d_reference(x, weight, None, 1, 1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_frozen_weights_stay_frozen():
    model = cnn().requires_grad_(False)
    adderkit.convert_(model, AdderConfig(terms=2))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_pattern_without_a_match_is_named(teacher):
    with pytest.warns(UserWarning, match=r"terms pattern 'features\.10\.\*' matches no convolution; nearest"):
        adderkit.plan(teacher, AdderConfig(terms={"features.10.*": 2}))


def test_saved_and_loaded(student, images, tmp_path):
    for layer in adder_layers(student).values():
        nn.init.normal_(layer.weight)
    loaded = adderkit.load(adderkit.save(student, tmp_path))
    assert {path: layer.terms for path, layer in adder_layers(loaded).items()} == {
        path: SEVERAL.get(path, 1) for path in adder_layers(student)
    }
    assert torch.equal(loaded(images), student(images))
    by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(by_timm(images), student(images))
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["features.1.conv1.adder"].shape == (16, 16, 3, 3, 3)
    assert tensors["features.2.conv1.adder"].shape == (16, 16, 3, 3)
    (record,) = json.loads((tmp_path / "config.json").read_text())["model_args"]["transforms"]
    assert record["terms"] == SEVERAL


def test_one_term_is_saved_as_without_terms(teacher, tmp_path):
    """The file is what safetensors writes of the weights, with this record and nothing else."""
    adderkit.convert_(teacher, AdderConfig(include=("features.1.*",), terms=1))
    adderkit.save(teacher, tmp_path / "saved")
    config = {
        "include": ["features.1.*"],
        "exclude": [],
        "skip_first": True,
        "skip_last": True,
        "skip_depthwise": False,
        "skip_gates": True,
        "norm": "insert",
        "version": 1,
    }
    modules = ["features.1.conv1", "features.1.conv2"]
    record = [{"kind": "adder", "version": 1, "modules": modules, "config": config}]
    named = {
        name.replace("weight", "adder") if name.removesuffix(".weight") in modules else name: tensor
        for name, tensor in teacher.state_dict().items()
    }
    expected = tmp_path / "expected.safetensors"
    save_file(named, expected, {"adderkit": json.dumps({"version": 1, "transforms": record})})
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == expected.read_bytes()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]["transforms"] == record


def test_weights_do_not_load_into_fewer_terms(student, teacher, tmp_path):
    adderkit.save(student, tmp_path / "several")
    adderkit.convert_(teacher, AdderConfig(include=INCLUDE))
    adderkit.save(teacher, tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").write_bytes((tmp_path / "several" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        adderkit.load(tmp_path / "one")


def test_replayed_record_gives_the_terms(student):
    again = replay(transforms_of(student), cnn)
    assert {path: layer.weight.shape for path, layer in adder_layers(again).items()} == {
        path: layer.weight.shape for path, layer in adder_layers(student).items()
    }


RECORD = {"kind": "adder", "version": 1, "modules": ["features.1.conv1"]}


@pytest.mark.parametrize(
    "record",
    [
        RECORD | {"terms": 2},
        RECORD | {"terms": {"features.1.conv1": 1}},
        RECORD | {"terms": {"features.1.conv1": 1 << 40}},
        RECORD | {"terms": {"features.1.conv1": 2.0}},
        RECORD | {"terms": {"features.1.conv2": 2}},
        RECORD | {"terms": [["features.1.conv1", 2]]},
        RECORD | {"kind": "plain", "terms": {"features.1.conv1": 2}},
    ],
)
def test_malformed_terms_in_a_record(record):
    with pytest.raises(CheckpointError, match=r"terms is .* transform"):
        checked_transforms([record])


def test_terms_count_towards_the_memory_that_a_file_may_ask_for(student, tmp_path):
    """The base model fits into the limit, the base model with eight terms does not."""
    from adderkit.convert.checkpoint import allocation

    elements = sum(tensor.numel() for tensor in student.state_dict().values())
    left = 16 * elements + allocation._SLACK
    with allocation.AllocationLimit(elements, "file") as limit:
        layer = adderkit.AdderConv2d(64, 64, 3)
        before = limit.left
        layer.set_terms_(8)
    assert before < left
    assert before - limit.left >= 8 * 64 * 64 * 9


def test_revert_to_the_mean_of_the_terms(student, teacher):
    unfitted = copy.deepcopy(student)
    adderkit.revert_(unfitted)
    assert all(
        torch.equal(tensor, other)
        for tensor, other in zip(unfitted.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert transforms_of(unfitted) == []
    for layer in adder_layers(student).values():
        nn.init.normal_(layer.weight)
    first, second, third = student.features[1].conv1.weight.detach().unbind(2)
    adderkit.revert_(student, ("features.1.*",))
    torch.testing.assert_close(student.features[1].conv1.weight, (4 * first + 2 * second + third) / 7)
    (record,) = transforms_of(student)
    assert record["terms"] == {"features.2.conv2": 2}


def test_layer_becomes_the_convolution_that_it_was(student, teacher, images):
    for path in SEVERAL:
        restore_convolution_(student.get_submodule(path), teacher.get_submodule(path))
    assert torch.equal(
        student.features[1](images.repeat(1, 6, 1, 1)[:, :16]), teacher.features[1](images.repeat(1, 6, 1, 1)[:, :16])
    )
    assert type(student.features[2].conv2) is nn.Conv2d


def test_normalized_and_folded_layers():
    """A standardized convolution whose output an activation reads: folded, with a BatchNorm of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), StdConv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    original = copy.deepcopy(model)
    adderkit.convert_(model, AdderConfig(terms=2), example_input=torch.zeros(1, 3, 8, 8))
    layer, expected = model[1], original[1].weight
    deviation, mean = torch.std_mean(expected, (1, 2, 3), correction=0, keepdim=True)
    assert layer.normalization.num_features == 6
    for term in layer.weight.unbind(2):
        torch.testing.assert_close(term, (expected - mean) / deviation, rtol=1e-3, atol=1e-3)
    restore_convolution_(layer, original[1])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), original(x))


def test_compiled_under_autocast_and_pruned(student, images):
    """In half precision a layer is that of its rounded input; pruning keeps the terms."""
    layer = student.features[1].conv1
    nn.init.normal_(layer.weight)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 16, 6, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(x)
    expected = adder_conv2d_reference(x.double(), layer.weight.double(), None, 1, 1, 1, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    adderkit.prune_(student, adderkit.PruneConfig(ratio=0.5, importance="magnitude"))
    assert layer.weight.shape == (8, 8, 3, 3, 3)
    again = replay(transforms_of(student), cnn)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again.eval()(images), student(images))


def test_targets_without_terms_are_refused(teacher, monkeypatch):
    from adderkit.convert.conversion.targets import TARGETS, Site, Target

    class Other(nn.Conv2d):
        pass

    monkeypatch.setitem(TARGETS, "other", Target("other", lambda: {Site(): Other}))
    with pytest.raises(AdderkitError, match=r"'features.1.conv1' would have 2 terms, but weights of other layers have"):
        adderkit.plan(teacher, AdderConfig(terms=2), to="other")
    with pytest.raises(CheckpointError, match="whose weights have one term"):
        checked_transforms([RECORD | {"kind": "other", "terms": {"features.1.conv1": 2}}])
