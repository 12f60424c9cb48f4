"""What a calibration leaves untouched, and what its result does not depend on."""

from dataclasses import replace

import pytest
import torch

from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.errors import AdderkitError

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


def test_only_adder_weights_and_statistics_change(pair, teacher, data, tiny_adders):
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


def test_teacher_is_left_untouched(pair, teacher, data, snapshot):
    teacher, student = pair(teacher.train())
    before = snapshot(teacher)
    calibrate_(student, teacher, data, FAST)
    assert snapshot(teacher) == before


def test_the_same_seed_gives_the_same_model(pair, teacher, data):
    states = []
    for seed in (1, 1, 2):
        _, student = pair(teacher)
        calibrate_(student, teacher, data, replace(FAST, seed=seed))
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["grouped.weight"], states[2]["grouped.weight"])


def test_global_random_state_does_not_matter(pair, teacher, data):
    weights = []
    for seed in (1, 2):
        _, student = pair(teacher)
        torch.manual_seed(seed)
        calibrate_(student, teacher, data, FAST)
        weights.append(student.grouped.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", [list, iter], ids=["list", "iterator"])
def test_batches_are_as_good_as_one_tensor(pair, teacher, data, form):
    _, first = pair(teacher)
    _, second = pair(teacher)
    calibrate_(first, teacher, data, FAST)
    calibrate_(second, teacher, form(data.split(24)), FAST)
    assert torch.equal(first.pointwise.weight, second.pointwise.weight)
    assert torch.equal(first.norm3.running_var, second.norm3.running_var)


def test_modes_are_restored(pair, teacher, data):
    teacher, student = pair(teacher)
    student.train()
    student.norm1.eval()
    teacher.head.train()
    before = [[module.training for module in model.modules()] for model in (student, teacher)]
    calibrate_(student, teacher, data, FAST)
    assert [[module.training for module in model.modules()] for model in (student, teacher)] == before


def test_modes_and_hooks_are_restored_after_an_error(pair, teacher, data, snapshot):
    teacher, student = pair(teacher)
    student.train()
    before = [snapshot(model) for model in (student, teacher)]
    with pytest.raises((AdderkitError, RuntimeError)):
        calibrate_(student, teacher, data[:, :2], FAST)
    assert [snapshot(model) for model in (student, teacher)] == before


def test_frozen_weights_are_fitted_and_stay_frozen(pair, teacher, data):
    teacher, student = pair(teacher)
    student.requires_grad_(False)
    before = student.grouped.weight.clone()
    calibrate_(student, teacher, data, FAST)
    assert not torch.equal(student.grouped.weight, before)
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_works_where_gradients_are_off(pair, teacher, data):
    teacher, student = pair(teacher)
    with torch.no_grad():
        report = calibrate_(student, teacher, data, FAST)
    assert len(report.layers) == 3
