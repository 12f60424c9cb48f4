"""Evaluation against a computation by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adderkit.recipes.training.evaluate import evaluate


def by_hand(logits, targets):
    """Top-1, top-5 and mean cross-entropy, image by image."""
    top1 = top5 = loss = 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda index: -row[index])
        top1 += target == ranked[0]
        top5 += target in ranked[:5]
        loss += math.log(sum(math.exp(value) for value in row)) - row[target]
    return 100 * top1 / len(targets), 100 * top5 / len(targets), loss / len(targets)


def measure(logits, targets, batch_size=4, model=None):
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(TensorDataset(logits, targets), batch_size)
    model, loader = accelerator.prepare(model or nn.Identity(), loader)
    return evaluate(model, loader, accelerator)


@pytest.mark.parametrize("images", [1, 8, 10], ids=["one-image", "whole-batches", "partial-batch"])
@pytest.mark.parametrize("classes", [2, 5, 12])
def test_metrics(images, classes):
    torch.manual_seed(images * classes)
    logits, targets = 2 * torch.randn(images, classes), torch.randint(0, classes, (images,))
    metrics = measure(logits, targets)
    assert (metrics.top1, metrics.top5, metrics.loss) == pytest.approx(by_hand(logits, targets), rel=1e-5)
    assert metrics.images == images
    assert metrics.images_per_second > 0


def test_metrics_do_not_depend_on_the_batch_size():
    logits, targets = torch.randn(23, 10), torch.randint(0, 10, (23,))
    found = [measure(logits, targets, size) for size in (1, 7, 23)]
    assert len({(metrics.top1, metrics.top5, metrics.images) for metrics in found}) == 1
    assert [metrics.loss for metrics in found] == pytest.approx([found[0].loss] * 3, rel=1e-6)


def test_half_precision_logits_are_judged_in_single():
    logits, targets = torch.randn(8, 10).half(), torch.randint(0, 10, (8,))
    assert measure(logits, targets).loss == pytest.approx(by_hand(logits, targets)[2], rel=1e-5)


def test_a_plain_iterable():
    batches = [(torch.eye(3), torch.arange(3)), (torch.eye(3)[:1], torch.tensor([2]))]
    metrics = evaluate(nn.Identity(), iter(batches), Accelerator(cpu=True))
    assert (metrics.top1, metrics.top5, metrics.images) == (75.0, 100.0, 4)


class Watcher(nn.Module):
    """Keeps the mode that it ran in."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()
        self.seen = []

    def forward(self, logits):
        self.seen.append((self.training, self.dropout.training, torch.is_grad_enabled()))
        return logits


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training):
    model = Watcher().train(training)
    measure(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), model=model)
    assert set(model.seen) == {(False, False, False)}
    assert model.training == training
    assert model.dropout.training == training


def test_a_part_that_was_kept_in_evaluation_mode_stays_so():
    model = Watcher().train()
    model.dropout.eval()
    measure(torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), model=model)
    assert model.training
    assert not model.dropout.training


def test_to_dict_is_json_ready():
    found = measure(torch.eye(3), torch.arange(3)).to_dict()
    assert set(found) == {"top1", "top5", "loss", "images", "images_per_second"}
    assert {type(value) for value in found.values()} <= {int, float}
