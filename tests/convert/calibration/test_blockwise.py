"""Fitting all layers together: closer to the teacher on new images, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn

from adderkit.adder_layers.modules import adder_layers
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.blockwise import Outputs, block_paths, difference, match_blocks_
from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.errors import AdderkitError
from adderkit.convert.graph.layers import trace_layers


def match(student, teacher, images, steps=30, memory=1 << 30, seed=0):
    calls = []
    match_blocks_(
        student,
        teacher,
        images,
        CalibrationConfig(matching_steps=steps, memory=memory),
        generator=torch.Generator().manual_seed(seed),
        progress=lambda *call: calls.append(call),
    )
    return calls


@pytest.fixture
def student(teacher):
    model = copy.deepcopy(teacher)
    convert_(model, example_input=torch.zeros(1, 3, 8, 8))
    calibrate_(model, teacher, torch.randn(64, 3, 8, 8), CalibrationConfig(steps=20, samples=512, matching_steps=0))
    return model


@torch.no_grad()
def block_errors(student, teacher, images):
    """Mean squared error after each of the layers, in units of the variance."""
    found = {}
    for name, model in (("ours", student), ("theirs", teacher)):
        for path in ("norm1", "norm2", "norm3"):
            handle = model.get_submodule(path).register_forward_hook(
                lambda module, inputs, output, key=(name, path): found.update({key: output})
            )
            model.eval()(images)
            handle.remove()
    pairs = [(found["ours", path], found["theirs", path]) for path in ("norm1", "norm2", "norm3")]
    return [((ours - theirs).square().mean() / theirs.var()).item() for ours, theirs in pairs]


def test_blocks_come_closer_to_the_teachers_on_new_images(student, teacher):
    data, fresh = torch.randn(128, 3, 8, 8), torch.randn(256, 3, 8, 8)
    before = block_errors(student, teacher, fresh)
    match(student, teacher, data, steps=60)
    reestimate_batchnorm_(student, [data])
    after = block_errors(student, teacher, fresh)
    assert sum(after) < 0.95 * sum(before), (before, after)


def test_what_was_not_converted_stays(student, teacher, tiny_adders, snapshot):
    before, teachers = snapshot(student), snapshot(teacher)
    match(student, teacher, torch.randn(32, 3, 8, 8), steps=3)
    after = snapshot(student)
    changed = {name for name in after["tensors"] if after["tensors"][name] != before["tensors"][name]}
    norms = {name.split(".")[0] for name in changed} - set(tiny_adders)
    assert norms == {"norm0", "norm1", "norm2", "norm3"}
    assert {f"{path}.weight" for path in tiny_adders} <= changed
    for key in ("classes", "modes", "hooks", "attributes", "gradients", "transforms"):
        assert after[key] == before[key], key
    assert snapshot(teacher) == teachers
    assert all(layer.sharpness == 1 for layer in adder_layers(student).values())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_same_seed_same_weights(student, teacher):
    images = torch.randn(32, 3, 8, 8)
    twin = copy.deepcopy(student)
    for model in (student, twin):
        match(model, teacher, images, steps=3)
    assert torch.equal(student.depthwise.weight, twin.depthwise.weight)


def test_no_steps_change_nothing(student, teacher, snapshot):
    before = snapshot(student)
    assert match(student, teacher, torch.randn(16, 3, 8, 8), steps=0) == []
    assert snapshot(student) == before


@pytest.mark.parametrize(("memory", "size"), [(1 << 30, 64), (20 * 4 * 2176 + 9, 20), (1, 8)])
def test_batches_are_as_large_as_memory_allows(student, teacher, memory, size):
    seen = []
    handle = student.stem.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    match(student, teacher, torch.randn(70, 3, 8, 8), steps=1, memory=memory)
    handle.remove()
    # Floats of an image: what the three layers take (8 x 64, 8 x 16, 8 x 16) and four times what they give.
    kept = 512 + 128 + 128 + 4 * (128 + 128 + 96)
    assert seen[-1] == size
    assert size in (8, min(64, memory // (4 * kept)))


def test_an_error_leaves_the_student_as_it_was_set(student, teacher, snapshot):
    before = snapshot(student)
    with pytest.raises(AttributeError):
        match(student, nn.Sequential(), torch.randn(16, 3, 8, 8))
    after = snapshot(student)
    for key in ("modes", "hooks", "gradients", "attributes"):
        assert after[key] == before[key], key


def test_blocks_of_a_residual_network_end_behind_the_addition(resnet20):
    model = resnet20()
    convert_(model)
    layers = [layer for layer in trace_layers(model) if layer.path in adder_layers(model)]
    paths = block_paths(model, layers)
    assert len(paths) == 9
    assert all(type(model.get_submodule(path)).__name__ == "BasicBlock" for path in paths)


def test_layers_without_a_block_are_compared_behind_their_normalization(student, teacher):
    layers = [layer for layer in trace_layers(student, torch.zeros(1, 3, 8, 8)) if layer.path in adder_layers(student)]
    assert block_paths(student, layers) == ["norm1", "norm2", "norm3"]


def test_a_layer_that_nothing_follows_is_compared_itself():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    convert_(model, AdderConfig(skip_first=False, skip_last=False), example_input=torch.zeros(1, 3, 8, 8))
    assert block_paths(model, trace_layers(model, torch.zeros(1, 3, 8, 8))) == ["1", "3"]


def test_difference_by_hand():
    """Squared errors 1 and 4, in units of the variances 8 and 2."""
    ours = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([3.0, 5.0])}
    theirs = {"a": torch.tensor([[0.0, 4.0]]), "b": torch.tensor([1.0, 3.0])}
    loss = difference(Outputs(ours, []), Outputs(theirs, []))
    torch.testing.assert_close(loss, torch.tensor((1 / 8 + 4 / 2) / 2))


def test_nothing_to_match_is_refused():
    with pytest.raises(AdderkitError, match="nothing to match: set matching_steps to 0"):
        difference(Outputs({}, []), Outputs({}, []))
