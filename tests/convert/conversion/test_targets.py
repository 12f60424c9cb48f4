"""A target of its own, in one row: power-of-two weights, converted, saved, loaded, reverted and refused."""

import copy
import dataclasses
import json

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import adderkit
from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.checkpoint.replay import replay
from adderkit.convert.conversion.targets import (
    TARGETS,
    Site,
    Target,
    converted_layers,
    is_converted,
    require_support,
    target_of,
)
from adderkit.convert.errors import AdderkitError, CheckpointError
from adderkit.convert.model_source import ModelSource
from adderkit.convert.record import model_form, transforms_of
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.data.unlabeled import UnlabeledImages
from adderkit.recipes.objectives.blocks import common_blocks
from adderkit.recipes.runs.layer_scales import watched_layers
from adderkit.recipes.runs.plan import RunPlan
from adderkit.recipes.verbs.convert import ConversionJob, run_conversion


class ShiftConv2d(nn.Conv2d):
    """A convolution whose weights act as the nearest powers of two."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, rounded(weight), bias)


def rounded(weight):
    return weight.sign() * torch.exp2(weight.abs().clamp_min(2**-20).log2().round())


@pytest.fixture(autouse=True)
def shift(monkeypatch):
    """The row that a new target adds."""
    target = Target("shift", lambda: {Site(): ShiftConv2d})
    monkeypatch.setitem(TARGETS, "shift", target)
    return target


@pytest.fixture
def teacher(resnet20):
    return resnet20()


@pytest.fixture
def student(teacher):
    model = copy.deepcopy(teacher)
    adderkit.convert_(model, to="shift")
    return model


def test_layers_compute_what_the_target_says(teacher, student, gray_images):
    for path in converted_layers(student):
        layer = teacher.get_submodule(path)
        layer.weight = nn.Parameter(rounded(layer.weight.detach()))
    assert torch.equal(student(gray_images), teacher(gray_images))


def test_the_record_and_the_plan_name_the_target(teacher, student):
    made = adderkit.plan(teacher, to="shift")
    assert set(converted_layers(student)) == set(made.paths("convert"))
    assert [transform["kind"] for transform in transforms_of(student)] == ["shift"]
    assert made.to_dict()["to"] == "shift"
    assert str(made).endswith("convolutions become shift layers")
    assert is_converted(student)
    assert adder_layers(student) == {}
    assert model_form(student) == "float"
    assert not any(row.inserted for row in made.rows)


def test_no_normalization_is_inserted_where_none_is_needed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    adderkit.convert_(model, adderkit.AdderConfig(norm="error"), example_input=torch.zeros(1, 3, 9, 9), to="shift")
    assert [type(layer).__name__ for layer in model] == ["Conv2d", "ShiftConv2d", "ReLU", "Conv2d"]


def test_a_site_without_a_layer_class_is_skipped():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Conv2dSame(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU())
    config = adderkit.AdderConfig(skip_last=False)
    made = adderkit.convert_(model, config, example_input=torch.zeros(1, 3, 9, 9), to="shift")
    assert made.rows[1].reason == "target shift has no layer class with TensorFlow's padding"
    assert made.paths("convert") == ["3"]
    record = [{"kind": "shift", "version": 1, "modules": ["1"]}]
    with pytest.raises(CheckpointError, match="'1' needs TensorFlow's padding, for which target 'shift' has no layer"):
        replay(record, lambda: copy.deepcopy(model))
    record = [{"kind": "shift", "version": 1, "modules": ["0"], "normalized": ["0"]}]
    with pytest.raises(CheckpointError, match="'0' needs a normalization of its own"):
        replay(record, lambda: copy.deepcopy(model))


@pytest.mark.parametrize(
    "loader", [adderkit.load, lambda name: timm.create_model(f"local-dir:{name}", pretrained=True)]
)
def test_saved_and_loaded(student, gray_images, tmp_path, loader):
    loaded = loader(adderkit.save(student, tmp_path / "net")).eval()
    assert {type(layer) for layer in converted_layers(loaded).values()} == {ShiftConv2d}
    assert torch.equal(loaded(gray_images), student(gray_images))
    assert transforms_of(loaded) == transforms_of(student)


def test_a_checkpoint_of_an_unknown_target_is_refused(student, tmp_path, monkeypatch):
    folder = adderkit.save(student, tmp_path / "net")
    monkeypatch.delitem(TARGETS, "shift")
    with pytest.raises(CheckpointError, match=r"unknown transform .*'shift'.*install a newer adderkit"):
        adderkit.load(folder)


def test_reverted(teacher, student, gray_images):
    count = len(converted_layers(student))
    assert adderkit.revert_(student, ("features.1.*",)) == 2
    assert adderkit.revert_(student) == count - 2
    assert transforms_of(student) == []
    assert not is_converted(student)
    assert torch.equal(student(gray_images), teacher(gray_images))


def test_two_targets_in_one_model(student, gray_images):
    adderkit.revert_(student, ("features.1.*",))
    made = adderkit.convert_(student)
    assert made.paths("convert") == ["features.1.conv1", "features.1.conv2"] == list(adder_layers(student))
    assert [transform["kind"] for transform in transforms_of(student)] == ["shift", "adder"]
    assert {row.reason for row in made.rows if row.decision == "converted"} == {"converted to shift already"}
    fresh = replay(
        json.loads(json.dumps(transforms_of(student))), lambda: timm.create_model("cifar_resnet20", in_chans=1)
    )
    assert {path: target_of(layer) for path, layer in converted_layers(fresh).items()} == {
        path: target_of(layer) for path, layer in converted_layers(student).items()
    }
    assert list(converted_layers(student, "adaptive_rate")) == made.paths("convert")


def test_verbs_refuse_what_the_target_does_not_support(teacher, student):
    images = torch.randn(32, 1, 16, 16)
    with pytest.raises(AdderkitError, match="'shift', which does not support calibration: "):
        adderkit.calibrate_(student, teacher, images)
    with pytest.raises(AdderkitError, match="'shift', which does not support pruning: "):
        adderkit.prune_(student, adderkit.PruneConfig(0.5), images)
    with pytest.raises(AdderkitError, match="'shift', which does not support quantization: "):
        adderkit.quantize(student, images)


def test_the_adaptive_rate_leaves_other_targets_alone(student):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no adder layer"):
        adderkit.AdaptiveRate(optimizer, student)


def test_a_target_that_supports_everything_is_not_refused(teacher):
    adderkit.convert_(teacher)
    for capability in TARGETS["adder"].supports:
        require_support(teacher, capability, "")


def test_the_verb_takes_the_target(resnet20, tmp_path):
    source = adderkit.save(resnet20(), tmp_path / "cnn")
    job = ConversionJob(ModelSource(str(source)), output=str(tmp_path / "net"), to="shift")
    assert "became shift layers in" in run_conversion(job, dry_run=False, announce=print).summary()
    assert is_converted(adderkit.load(tmp_path / "net"))
    calibrated = dataclasses.replace(job, output=str(tmp_path / "other"), images=UnlabeledImages("digits", None, 32))
    with pytest.raises(AdderkitError, match="layers of target shift cannot be calibrated: leave out --dataset"):
        run_conversion(calibrated, dry_run=False, announce=print)


def test_unknown_target(teacher):
    with pytest.raises(AdderkitError, match="target 'spline' is unknown, expected one of adder, shift"):
        adderkit.convert_(teacher, to="spline")


def test_a_plan_has_its_target(teacher):
    made = adderkit.plan(teacher, to="shift")
    with pytest.raises(ValueError, match="a plan was given"):
        adderkit.convert_(teacher, made, to="adder")
    adderkit.convert_(teacher, made)
    assert set(map(target_of, converted_layers(teacher).values())) == {TARGETS["shift"]}


def test_training_counts_watches_and_compares_converted_layers(teacher, student):
    known = dict.fromkeys(("teacher", "images", "evaluation_images", "steps_per_epoch"))
    run = RunPlan.of(student, model="x", recipe=Recipe(), processes=1, **known)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in teacher.modules())
    assert (run.converted_layers, run.convolutions) == (20, convolutions - 20)
    assert set(watched_layers(student)) == set(adderkit.plan(teacher, to="shift").paths("convert"))
    assert common_blocks(student, teacher)
