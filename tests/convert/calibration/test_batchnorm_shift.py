"""BatchNorm in the teacher's domain: the same function, but measuring statistics gives what the teacher gives."""

import copy

import pytest
import torch
from torch import nn

from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.batchnorm_shift import calibration_statistics, measure_shifts


@pytest.fixture
def teacher():
    """Trained on one kind of images, as its statistics say."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    reestimate_batchnorm_(model, [torch.randn(64, 3, 9, 9)])
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return model.eval()


@pytest.fixture
def images():
    """Of another kind."""
    return 3 * torch.rand(48, 3, 9, 9) + 2


def test_shifts_are_those_of_the_inputs(teacher, images):
    shift = measure_shifts(teacher, [images])["1"]
    values, norm = teacher[0](images).transpose(0, 1).flatten(1), teacher[1]
    deviation = norm.running_var.sqrt()
    torch.testing.assert_close(shift.offset, (values.mean(1) - norm.running_mean) / deviation, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shift.ratio, values.std(1) / deviation, rtol=1e-3, atol=1e-3)


def test_the_function_is_the_same_inside_and_after(teacher, images):
    student, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
    expected = teacher(images)
    with calibration_statistics(student, teacher, images.split(16)):
        assert not torch.equal(student[1].weight, before["1.weight"])
        torch.testing.assert_close(student(images), expected, rtol=1e-4, atol=1e-4)
        values = teacher[0](images).transpose(0, 1).flatten(1)
        torch.testing.assert_close(student[1].running_mean, values.mean(1), rtol=1e-3, atol=1e-3)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)


def test_measuring_changes_nothing_where_nothing_was_converted(teacher, images):
    expected = teacher(images)
    student, plain = copy.deepcopy(teacher), copy.deepcopy(teacher)
    with calibration_statistics(student, teacher, [images]):
        reestimate_batchnorm_(student, [images])
    torch.testing.assert_close(student(images), expected, rtol=1e-3, atol=1e-3)
    reestimate_batchnorm_(plain, [images])
    assert (plain(images) - expected).abs().mean() > 0.3


def test_what_changed_before_a_norm_gets_the_mean_and_variance_of_the_teachers(teacher, images):
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[3].weight.mul_(-5).add_(1)
    with calibration_statistics(student, teacher, [images]):
        reestimate_batchnorm_(student, [images])
    ours, theirs = student(images), teacher(images)
    torch.testing.assert_close(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_dead_channels_stay_finite(teacher, images):
    with torch.no_grad():
        teacher[0].weight[0] = 0  # constant for these images, though the statistics say otherwise
    student = copy.deepcopy(teacher)
    with calibration_statistics(student, teacher, [images]):
        reestimate_batchnorm_(student, [images])
    assert all(bool(value.isfinite().all()) for value in student.state_dict().values())


def test_norms_that_the_teacher_lacks_are_left_alone(teacher, images):
    student = nn.Sequential(*copy.deepcopy(teacher), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)).eval()
    with calibration_statistics(student, teacher, [images]):
        assert torch.equal(student[5].running_mean, torch.zeros(4))
        assert torch.equal(student[5].weight, torch.ones(4))


def test_all_is_as_before_after_an_error(teacher, images):
    student, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
    with pytest.raises(RuntimeError, match="stop"), calibration_statistics(student, teacher, [images]):
        raise RuntimeError("stop")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)
    assert not teacher[1]._forward_pre_hooks
