"""Distillation: the loss against its formula, and a teacher that sees images as it was trained to."""

import math

import pytest
import timm
import torch
from torch import nn

from adderkit.recipes.data.datasets import DataConfig
from adderkit.recipes.objectives.teacher import DistillationTeacher, distillation_loss

OVERLAY = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
STUDENT = DataConfig((3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear", 1.0)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", pretrained_cfg_overlay=OVERLAY)


def divergence(student, teacher, temperature):
    """Sum over classes of ``p · log(p / q)``, p the teacher's, in plain numbers."""
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        ours, theirs = ([math.exp(value / temperature) for value in row] for row in (ours, theirs))
        for q, p in zip(ours, theirs, strict=True):
            q, p = q / sum(ours), p / sum(theirs)
            total += p * math.log(p / q)
    return total / len(student) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_loss_is_the_formula(temperature):
    student, teacher = torch.randn(6, 5, dtype=torch.float32), 3 * torch.randn(6, 5)
    loss = distillation_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(divergence(student, teacher, temperature), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_of_equal_predictions_is_zero(temperature):
    logits = torch.randn(4, 10)
    shifted = logits + torch.randn(4, 1)  # softmax does not see a constant
    assert distillation_loss(shifted, logits, temperature).item() == pytest.approx(0, abs=1e-6)


def test_temperature_keeps_the_size_of_the_gradient():
    """For high temperatures the gradient tends to ``(student - teacher) / classes``, both centered, over the batch."""
    student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
    distillation_loss(student, teacher, 1000.0).backward()
    difference = student.detach() - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / 10 / 4
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=1e-4)


def test_loss_is_computed_in_single_precision():
    student, teacher = torch.randn(4, 10).half(), torch.randn(4, 10).half()
    loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(divergence(student.float(), teacher.float(), 2.0), rel=1e-4)


def normalized(images, mean, std):
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def test_teacher_gets_images_normalized_its_own_way(network):
    images = torch.rand(4, 3, 32, 32)
    logits = DistillationTeacher(network, STUDENT)(normalized(images, STUDENT.mean, STUDENT.std))
    with torch.no_grad():
        expected = network(normalized(images, **OVERLAY))
        without = network(normalized(images, STUDENT.mean, STUDENT.std))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - without).abs().max() > 0.01


def test_equal_normalization_changes_nothing(network):
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(DistillationTeacher(network, DataConfig.of(network))(images), network.eval()(images))


def test_teacher_stays_frozen_and_in_evaluation_mode(network):
    teacher = DistillationTeacher(network.train(), STUDENT)
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
        DistillationTeacher(network, gray)
