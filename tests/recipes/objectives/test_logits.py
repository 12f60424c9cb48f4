"""Logit distillation: the loss against its formula."""

import math

import pytest
import torch

from adderkit.recipes.objectives.logits import distillation_loss


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
