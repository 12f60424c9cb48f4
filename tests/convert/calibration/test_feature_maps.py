"""Calibration of networks that return feature maps instead of logits: timm's ``features_only``, and one's own."""

import copy
import dataclasses

import pytest
import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.blockwise import Outputs, difference
from adderkit.convert.errors import AdderkitError

FAST = adderkit.CalibrationConfig(steps=5, samples=256, matching_steps=20)


class Stages(nn.Module):
    """Two maps in a dictionary, the second in a list, as dense heads want them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        first = self.stage(self.stem(x))
        return {"first": first, "rest": [self.last(first), "a note"]}


def pair(teacher):
    torch.manual_seed(0)
    student = copy.deepcopy(teacher)
    adderkit.convert_(student, example_input=torch.zeros(1, 3, 16, 16))
    return student


@torch.no_grad()
def errors(student, teacher, images):
    """Error of each map, in units of its variance."""
    both = zip(*(tree_leaves(model.eval()(images)) for model in (student, teacher)), strict=True)
    return [((ours - theirs).square().mean() / theirs.var()).item() for ours, theirs in both if ours is not theirs]


def test_error_of_maps_by_hand():
    """Squared errors 1 and 4, in units of the variances 8 and 2; then the mean of each list."""
    ours = [torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[3.0, 5.0]]]])]
    theirs = [torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[[1.0, 3.0]]]])]
    expected = (1 / 8 + 4 / 2) / 2
    assert difference(Outputs({}, ours), Outputs({}, theirs)).item() == pytest.approx(expected)
    blocks = Outputs({"block": ours[0]}, ours), Outputs({"block": theirs[0]}, theirs)
    assert difference(*blocks).item() == pytest.approx(1 / 8 + expected)


def test_other_outputs_than_the_teachers_are_refused():
    with pytest.raises(AdderkitError, match=r"returns 1 feature maps, expected 2"):
        difference(Outputs({}, [torch.zeros(1, 2, 3, 3)]), Outputs({}, [torch.zeros(1, 2, 3, 3)] * 2))
    with pytest.raises(AdderkitError, match=r"output of the model has shape \[1, 2, 3, 3\]"):
        difference(Outputs({}, [torch.zeros(1, 2, 3, 3)]), Outputs({}, [torch.zeros(1, 4, 3, 3)]))


def test_maps_come_closer_to_the_teachers():
    torch.manual_seed(0)
    teacher, images, fresh = Stages().eval(), torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16)
    student = pair(teacher)
    uncalibrated = copy.deepcopy(student)
    reestimate_batchnorm_(uncalibrated, [images])
    report = adderkit.calibrate_(student, teacher, images, FAST)
    assert [layer.path for layer in report.layers] == ["stage.0", "last.0"]
    before, after = errors(uncalibrated, teacher, fresh), errors(student, teacher, fresh)
    assert all(now < 0.7 * then for now, then in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_every_feature_extractor_of_timm(feature_cls):
    torch.manual_seed(0)
    arguments = {"features_only": True, "out_indices": (1, 2), "feature_cls": feature_cls}
    teacher = timm.create_model("test_resnet", **arguments)
    images = torch.randn(16, 3, 32, 32)
    student = pair(teacher)
    uncalibrated = copy.deepcopy(student)
    reestimate_batchnorm_(uncalibrated, [images])
    adderkit.calibrate_(student, teacher, images, dataclasses.replace(FAST, steps=2, matching_steps=12))
    before, after = errors(uncalibrated, teacher, images), errors(student, teacher, images)
    assert len(after) == 2
    assert all(now < then for now, then in zip(after, before, strict=True)), (before, after)
