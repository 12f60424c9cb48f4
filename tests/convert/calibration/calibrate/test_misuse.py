"""Calibration that cannot work is refused before anything changes."""

import copy

import pytest
import torch
from torch import nn

from adderkit.convert.calibration.calibrate import calibrate_
from adderkit.convert.calibration.config import CalibrationConfig
from adderkit.convert.conversion.rewrite import convert_
from adderkit.convert.errors import AdderkitError

FAST = CalibrationConfig(steps=20, samples=512, matching_steps=0)


def test_model_that_is_not_converted(teacher, data):
    with pytest.raises(AdderkitError, match=r"no adder layer.*convert_"):
        calibrate_(copy.deepcopy(teacher), teacher, data)


@pytest.mark.parametrize(
    "images",
    [torch.randn(15, 3, 8, 8), [torch.randn(15, 3, 8, 8)], []],
    ids=["tensor", "batches", "none"],
)
def test_too_few_images(pair, teacher, images):
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
def test_wrong_teacher_is_named_before_anything_changes(pair, teacher, data, snapshot, change, message):
    teacher, student = pair(teacher)
    change(teacher)
    before = snapshot(student)
    with pytest.raises(AdderkitError, match=message):
        calibrate_(student, teacher, data, FAST)
    assert snapshot(student) == before
