"""A teacher that sees images as it was trained to."""

import pytest
import timm
import torch
from torch import nn

from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.teacher import DistillationTeacher, FrozenTeacher

OVERLAY = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
STUDENT = DataConfig((3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear", 1.0)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", pretrained_cfg_overlay=OVERLAY)


def normalized(images, mean, std):
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def test_teacher_gets_images_normalized_its_own_way(network):
    images = torch.rand(4, 3, 32, 32)
    logits = FrozenTeacher(network, STUDENT)(normalized(images, STUDENT.mean, STUDENT.std))
    with torch.no_grad():
        expected = network(normalized(images, **OVERLAY))
        without = network(normalized(images, STUDENT.mean, STUDENT.std))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - without).abs().max() > 0.01


def test_equal_normalization_changes_nothing(network):
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(FrozenTeacher(network, DataConfig.of(network))(images), network.eval()(images))


def test_teacher_stays_frozen_and_in_evaluation_mode(network):
    teacher = FrozenTeacher(network.train(), STUDENT)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    nn.Sequential(teacher).train()
    logits = teacher(torch.randn(4, 3, 32, 32, requires_grad=True))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_channels_must_agree(network):
    gray = DataConfig((1, 32, 32), (0.5,), (0.5,), "bilinear", 1.0)
    with pytest.raises(ValueError, match="the teacher takes 3 channels, expected 1 as the student takes"):
        FrozenTeacher(network, gray)


def test_a_teacher_that_trains_keeps_its_mode_and_its_gradients(network):
    teacher = DistillationTeacher(network, STUDENT).train()
    assert all(module.training for module in teacher.modules())
    teacher(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in teacher.parameters())
