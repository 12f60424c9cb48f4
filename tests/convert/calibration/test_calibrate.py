"""Calibration of small networks on random images: closer to the teacher, repeatable, and clear about misuse."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration import layerwise as layer_fit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.calibration.reconstruction import reconstruct
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.errors import AdderkitError

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


def pair(teacher):
    """A network and its converted copy."""
    student = copy.deepcopy(teacher)
    convert_(student, example_input=torch.zeros(1, 3, 8, 8))
    return teacher, student


@pytest.fixture
def data():
    return torch.randn(64, 3, 8, 8)


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


def test_follows_the_teacher_better_on_new_images(teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    uncalibrated, fresh = copy.deepcopy(student), torch.randn(64, 3, 8, 8)
    reestimate_batchnorm_(uncalibrated, [data])
    calibrate_(student, teacher, data, CalibrationConfig(steps=60, samples=2048))
    for path in tiny_adders:
        assert fidelity(student, teacher, path, fresh) > fidelity(uncalibrated, teacher, path, fresh), path


def test_steps_help(teacher, data):
    means = []
    for steps in (0, 60):
        _, student = pair(teacher)
        report = calibrate_(student, teacher, data, CalibrationConfig(steps=steps, samples=2048))
        means.append(sum(layer.correlation for layer in report.layers))
    assert means[1] > means[0]


def test_report_has_a_row_for_every_adder_layer_in_order(teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    report = calibrate_(student, teacher, data, replace(FAST, seed=3))
    assert [layer.path for layer in report.layers] == tiny_adders
    assert (report.config, report.images, report.samples) == (replace(FAST, seed=3), 64, 512)
    assert all(-1 <= layer.worst <= layer.correlation <= 1 for layer in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["path"] == "grouped"


def test_reported_fidelity_is_that_of_held_out_images(teacher):
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


def test_only_adder_weights_and_statistics_change(teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    calibrate_(student, teacher, data, FAST)
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if "norm" not in name} == {f"{path}.weight" for path in tiny_adders}
    assert {name.split(".")[1] for name in changed if "norm" in name} <= {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_teacher_is_left_untouched(teacher, data, snapshot):
    teacher, student = pair(teacher.train())
    before = snapshot(teacher)
    calibrate_(student, teacher, data, FAST)
    assert snapshot(teacher) == before


def test_norms_give_the_mean_and_variance_of_the_teachers(teacher, data):
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


def test_the_same_seed_gives_the_same_model(teacher, data):
    states = []
    for seed in (1, 1, 2):
        _, student = pair(teacher)
        calibrate_(student, teacher, data, replace(FAST, seed=seed))
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["grouped.weight"], states[2]["grouped.weight"])


def test_global_random_state_does_not_matter(teacher, data):
    weights = []
    for seed in (1, 2):
        _, student = pair(teacher)
        torch.manual_seed(seed)
        calibrate_(student, teacher, data, FAST)
        weights.append(student.grouped.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", [list, iter], ids=["list", "iterator"])
def test_batches_are_as_good_as_one_tensor(teacher, data, form):
    _, first = pair(teacher)
    _, second = pair(teacher)
    calibrate_(first, teacher, data, FAST)
    calibrate_(second, teacher, form(data.split(24)), FAST)
    assert torch.equal(first.pointwise.weight, second.pointwise.weight)
    assert torch.equal(first.norm3.running_var, second.norm3.running_var)


def test_modes_are_restored(teacher, data):
    teacher, student = pair(teacher)
    student.train()
    student.norm1.eval()
    teacher.head.train()
    before = [[module.training for module in model.modules()] for model in (student, teacher)]
    calibrate_(student, teacher, data, FAST)
    assert [[module.training for module in model.modules()] for model in (student, teacher)] == before


def test_modes_and_hooks_are_restored_after_an_error(teacher, data, snapshot):
    teacher, student = pair(teacher)
    student.train()
    before = [snapshot(model) for model in (student, teacher)]
    with pytest.raises((AdderkitError, RuntimeError)):
        calibrate_(student, teacher, data[:, :2], FAST)
    assert [snapshot(model) for model in (student, teacher)] == before


def test_progress_goes_from_nothing_to_all(teacher, data, tiny_adders):
    teacher, student = pair(teacher)
    calls = []
    settings = replace(FAST, matching_steps=2, batch_size=32)
    calibrate_(student, teacher, data, settings, progress=lambda *call: calls.append(call))
    assert calls == [
        ("layers", 0, 3),
        *((path, index, 3) for index, path in enumerate(tiny_adders)),
        ("layers", 3, 3),
        *(("all layers", step, 2) for step in range(3)),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_another_dtype(teacher, data, dtype):
    teacher, student = pair(teacher.to(dtype))
    report = calibrate_(student, teacher, data, FAST)
    assert student.grouped.weight.dtype == dtype
    assert report.layers[0].correlation > 0.5


def test_frozen_weights_are_fitted_and_stay_frozen(teacher, data):
    teacher, student = pair(teacher)
    student.requires_grad_(False)
    before = student.grouped.weight.clone()
    calibrate_(student, teacher, data, FAST)
    assert not torch.equal(student.grouped.weight, before)
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_works_where_gradients_are_off(teacher, data):
    teacher, student = pair(teacher)
    with torch.no_grad():
        report = calibrate_(student, teacher, data, FAST)
    assert len(report.layers) == 3


def test_normalization_without_statistics(data):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2)
    )
    teacher, student = pair(model)
    assert calibrate_(student, teacher, data, FAST).layers[0].path == "2"


def test_layer_called_twice(data):
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


# Misuse


def test_model_that_is_not_converted(teacher, data):
    with pytest.raises(AdderkitError, match=r"no adder layer.*convert_"):
        calibrate_(copy.deepcopy(teacher), teacher, data)


@pytest.mark.parametrize(
    "images",
    [torch.randn(15, 3, 8, 8), [torch.randn(15, 3, 8, 8)], []],
    ids=["tensor", "batches", "none"],
)
def test_too_few_images(teacher, images):
    teacher, student = pair(teacher)
    with pytest.raises(AdderkitError, match=r"(15|0) calibration images are too few, expected at least 16"):
        calibrate_(student, teacher, images)


def wider(model):
    model.grouped = nn.Conv2d(8, 8, 5, padding=2, stride=2, groups=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"'grouped' has weights of shape \(8, 4, 5, 5\), expected \(8, 4, 3, 3\)"),
        (lambda model: setattr(model, "grouped", nn.Identity()), "has a Identity at 'grouped'"),
        (lambda model: delattr(model, "grouped"), "has nothing at 'grouped'"),
        (lambda model: convert_(model, example_input=torch.zeros(1, 3, 8, 8)), "'grouped'"),
    ],
    ids=["another-shape", "another-class", "missing", "converted-too"],
)
def test_wrong_teacher_is_named_before_anything_changes(teacher, data, snapshot, change, message):
    teacher, student = pair(teacher)
    change(teacher)
    before = snapshot(student)
    with pytest.raises(AdderkitError, match=message):
        calibrate_(student, teacher, data, FAST)
    assert snapshot(student) == before


# Shares, memory, and going on


@pytest.fixture
def fitted_windows(monkeypatch):
    """The windows that each layer was fitted to."""
    seen = []
    monkeypatch.setattr(
        layer_fit, "reconstruct", lambda windows, *rest: seen.append(windows) or reconstruct(windows, *rest)
    )
    return seen


def test_share_of_weights_beyond_the_range_of_their_channel(teacher, data, fitted_windows):
    teacher, student = pair(teacher)
    report = calibrate_(student, teacher, data, replace(FAST, matching_steps=5))
    held_out = 1 / 8
    for layer, windows in zip(report.layers[:1], fitted_windows, strict=False):
        by_channel = windows.unflatten(2, (-1, 9))  # [G, S, C, taps]
        weight = student.get_submodule(layer.path).weight.detach().reshape(2, 4, 4, 9)  # [G, O, C, taps]
        low, high = by_channel.amin((1, 3))[:, None, :, None], by_channel.amax((1, 3))[:, None, :, None]
        share = ((weight <= low) | (weight >= high)).float().mean().item()
        assert 0 < share < 1
        assert layer.beyond_range == pytest.approx(share, abs=held_out)  # which widens the ranges a little


def test_scaled_copies_lie_beyond(teacher, data):
    """Weights 1024 times as large as a convolution's pass no input."""
    teacher, student = pair(teacher)
    for layer in adder_layers(student).values():
        layer.weight.data.mul_(1e6)
    report = calibrate_(student, teacher, data, CalibrationConfig(steps=0, samples=512, matching_steps=0))
    assert [layer.beyond_range for layer in report.layers] == [1.0, 1.0, 1.0]


def test_little_memory_means_fewer_samples(teacher, data, fitted_windows):
    teacher, student = pair(teacher)
    memory = 64 * 36 * 8 * 4 * 4  # room for two windows of each image in the widest layer, held four times in fp32
    report = calibrate_(
        student, teacher, data, CalibrationConfig(steps=5, samples=1 << 20, matching_steps=0, memory=memory)
    )
    assert report.samples == 2 * 64
    assert fitted_windows[0].shape == (2, 2 * 56, 36)
    assert max(windows.numel() for windows in fitted_windows) * 4 * 4 <= memory


def test_little_memory_means_more_passes_of_the_teacher(teacher, data, monkeypatch):
    passes = []
    real = layer_fit.layer_outputs
    monkeypatch.setattr(
        layer_fit, "layer_outputs", lambda *arguments: passes.append(list(arguments[1])) or real(*arguments)
    )
    teacher, student = pair(teacher)
    calibrate_(
        student,
        teacher,
        data,
        CalibrationConfig(steps=5, samples=64, matching_steps=0, memory=2 * (64 * 8 * 4 + 64 * 8 * 4)),
    )
    assert passes == [["grouped", "depthwise"], ["pointwise"]]


class CutError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("layer", ["depthwise", "pointwise", "all layers"])
def test_goes_on_where_it_was_cut_off_to_the_same_bits(teacher, data, tmp_path, layer):
    settings = replace(FAST, matching_steps=3)
    teacher, whole = pair(teacher)
    expected = calibrate_(whole, teacher, data, settings)

    def cut(what, done, total):
        if what == layer:
            raise CutError

    state = tmp_path / "state"
    _, student = pair(teacher)
    with pytest.raises(CutError):
        calibrate_(student, teacher, data, settings, state=state, progress=cut)
    assert state.is_file()
    _, student = pair(teacher)
    calls = []
    actual = calibrate_(student, teacher, data, settings, state=state, progress=lambda *call: calls.append(call[0]))
    assert actual == expected
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    assert "grouped" not in calls
    assert not state.exists()


@pytest.mark.parametrize("change", ["seed", "images", "teacher", "student", "damage"])
def test_state_of_something_else_is_not_taken(teacher, data, tmp_path, change, caplog):
    state = tmp_path / "state"
    teacher, student = pair(teacher)

    def cut(what, done, total):
        if what == "pointwise":
            raise CutError

    with pytest.raises(CutError):
        calibrate_(student, teacher, data, FAST, state=state, progress=cut)
    if change == "damage":
        state.write_bytes(state.read_bytes()[:100])
    if change == "teacher":
        teacher.stem.weight.data.mul_(1.5)
    if change == "images":
        data = data.flip(0)
    _, fresh = pair(teacher)
    if change == "student":
        fresh.grouped.weight.data.mul_(1.5)
    calls = []
    settings = replace(FAST, seed=1 if change == "seed" else 0)
    calibrate_(fresh, teacher, data, settings, state=state, progress=lambda *call: calls.append(call[0]))
    assert "grouped" in calls
    assert ("damaged" in caplog.text) == (change == "damage")
