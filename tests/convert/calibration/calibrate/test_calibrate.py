"""Calibration of small networks on random images: how well layers are fitted, and what the report says."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


def outputs_at(model, paths, images):
    """Whole outputs of some layers."""
    found = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: found.update({path: y}))
        for path in paths
    ]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def fidelity(student, teacher, path, images):
    """Mean over channels of torch's correlation of a layer's outputs in two networks."""
    ours, theirs = (outputs_at(model, [path], images)[path].transpose(0, 1).flatten(1) for model in (student, teacher))
    pairs = [torch.stack(both) for both in zip(ours, theirs, strict=True)]
    return float(torch.stack([torch.corrcoef(both)[0, 1] for both in pairs]).mean())


def test_follows_the_teacher_better_on_new_images(pair, teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    uncalibrated, fresh = copy.deepcopy(student), torch.randn(64, 3, 8, 8)
    reestimate_batchnorm_(uncalibrated, [data])
    calibrate_(student, teacher, data, CalibrationConfig(steps=60, samples=2048))
    for path in tiny_adders:
        assert fidelity(student, teacher, path, fresh) > fidelity(uncalibrated, teacher, path, fresh), path


def test_steps_help(pair, teacher, data):
    means = []
    for steps in (0, 60):
        _, student = pair(teacher)
        report = calibrate_(student, teacher, data, CalibrationConfig(steps=steps, samples=2048))
        means.append(sum(layer.correlation for layer in report.layers))
    assert means[1] > means[0]


def test_report_has_a_row_for_every_adder_layer_in_order(pair, teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    report = calibrate_(student, teacher, data, replace(FAST, seed=3))
    assert [layer.path for layer in report.layers] == tiny_adders
    assert (report.config, report.images, report.samples) == (replace(FAST, seed=3), 64, 512)
    assert all(-1 <= layer.worst <= layer.correlation <= 1 for layer in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["path"] == "grouped"


def test_reported_fidelity_is_that_of_held_out_images(pair, teacher):
    # Enough weights to learn a few images by heart: fidelity on them would be far above that on others.
    data, fresh = torch.randn(16, 3, 8, 8), torch.randn(256, 3, 8, 8)
    teacher, student = pair(teacher)
    report = calibrate_(student, teacher, data, CalibrationConfig(steps=200, samples=16 * 16))
    for layer in report.layers[:1]:
        assert layer.correlation == pytest.approx(fidelity(student, teacher, layer.path, fresh), abs=0.15)


@pytest.mark.parametrize("path", ["grouped", "depthwise", "pointwise"])
def test_each_kind_of_layer(teacher, data, path):
    student = copy.deepcopy(teacher)
    convert_(student, AdderConfig(include=(path,)), example_input=data[:1])
    before = student.get_submodule(path).weight.detach().clone()
    report = calibrate_(student, teacher, data, FAST)
    weight = student.get_submodule(path).weight
    assert [layer.path for layer in report.layers] == [path]
    assert weight.shape == before.shape
    assert not torch.equal(weight, before)
    assert report.layers[0].correlation > 0.7


def test_norms_give_the_mean_and_variance_of_the_teachers(pair, teacher, data):
    """Whatever images the teacher's statistics are from."""
    teacher, student = pair(teacher)
    calibrate_(student, teacher, data, replace(FAST, batch_size=len(data)))
    seen = {}
    for name, model in (("student", student), ("teacher", teacher)):
        model.norm2.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        model.eval()(data)
    ours, theirs = seen["student"], seen["teacher"]
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_progress_goes_from_nothing_to_all(pair, teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    calls = []
    settings = replace(FAST, matching_steps=2, batch_size=32)
    calibrate_(student, teacher, data, settings, progress=lambda *call: calls.append(call))
    layers, steps = ["layers", *tiny_adders, "layers"], ["all layers"] * 3
    assert [what for what, _, _ in calls] == [*layers, *steps, "statistics", "statistics"]
    done = [done for _, done, _ in calls]
    assert (done[0], done[-1], done) == (0, 1000, sorted(done))
    assert {total for _, _, total in calls} == {1000}
    # Layers by the distances of their fits and passes, on 64 images: the pointwise one has no 3x3 windows.
    grouped, depthwise, pointwise = (after - before for before, after in pairwise(done[1:5]))
    assert grouped > depthwise
    assert grouped > pointwise > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_another_dtype(pair, teacher, data, dtype):
    teacher, student = pair(teacher.to(dtype))
    report = calibrate_(student, teacher, data, FAST)
    assert student.grouped.weight.dtype == dtype
    assert report.layers[0].correlation > 0.5


def test_normalization_without_statistics(pair, data):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2)
    )
    teacher, student = pair(model)
    assert calibrate_(student, teacher, data, FAST).layers[0].path == "2"


def test_layer_called_twice(pair, data):
    stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twice = [conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4)]
    teacher, student = pair(nn.Sequential(*stem, *twice, nn.Flatten(), nn.Linear(256, 2)))
    assert list(adder_layers(student)) == ["3"]
    report = calibrate_(student, teacher, data, CalibrationConfig(batch_size=16, steps=60, samples=2048))
    assert report.layers[0].correlation > 0.7


def test_batch_of_one_image_at_the_end(resnet20):
    # The classifier's BatchNorm sees one value for each image and channel; of a single value there is no variance.
    teacher = resnet20()
    student = copy.deepcopy(teacher)
    convert_(student, AdderConfig(include=("features.9.*",)))
    report = calibrate_(
        student, teacher, torch.randn(17, 1, 8, 8), CalibrationConfig(batch_size=16, steps=1, samples=64)
    )
    assert report.images == 17
