"""Re-estimated BatchNorm statistics: their values, and what else must stay unchanged."""

import pytest
import torch
from torch import nn

from adderkit.convert.calibration.batchnorm import batch_norms, reestimate_batchnorm_


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def statistics(model):
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in batch_norms(model)]


def by_hand(model, batches):
    """Statistics of the first BatchNorm's input; then those of the second's, given the first normalizes by batch."""
    conv1, norm1, _, conv2, _ = model
    results = []
    first = [conv1(batch) for batch in batches]
    second = []
    for values in first:
        mean, var = values.mean((0, 2, 3), keepdim=True), values.var((0, 2, 3), correction=0, keepdim=True)
        scale = norm1.weight[:, None, None] / (var + norm1.eps).sqrt()
        second.append(conv2((values - mean) * scale + norm1.bias[:, None, None]))
    for outputs in (first, second):
        mean = torch.cat(outputs).mean((0, 2, 3))
        var = torch.stack([values.var((0, 2, 3)) for values in outputs]).mean(0)
        results.append((mean, var))
    return results


@torch.no_grad()
def test_statistics_are_the_averages_over_the_data(tiny):
    model, batches = net().double(), list(torch.randn(24, 3, 6, 6, dtype=torch.float64).split(8))
    for norm in batch_norms(model):
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    expected = by_hand(model, batches)
    assert reestimate_batchnorm_(model, batches) == 24
    for actual, wanted in zip(statistics(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_earlier_statistics_are_forgotten():
    model, batches = net(), list(torch.randn(16, 3, 6, 6).split(8))
    reestimate_batchnorm_(model, batches)
    expected = statistics(model)
    nn.init.constant_(model[1].running_mean, 100)
    model[1].num_batches_tracked.fill_(1000)
    reestimate_batchnorm_(model, iter(batches))
    torch.testing.assert_close(statistics(model), expected)


def test_dropout_is_off_meanwhile():
    model, seen = net().train(), []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(torch.equal(inputs[0], output)))
    reestimate_batchnorm_(model, [torch.randn(8, 3, 6, 6)])
    assert seen == [True]


def test_modes_and_momenta_are_restored():
    model = net().train()
    model[1].eval()
    model[1].momentum, model[4].momentum = 0.3, None
    before = [module.training for module in model.modules()]
    reestimate_batchnorm_(model, [torch.randn(8, 3, 6, 6)])
    assert [module.training for module in model.modules()] == before
    assert (model[1].momentum, model[4].momentum) == (0.3, None)


def test_modes_and_momenta_are_restored_after_an_error():
    model = net().train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        reestimate_batchnorm_(model, [torch.randn(8, 3, 6, 6), torch.randn(8, 5, 6, 6)])
    assert [module.training for module in model.modules()] == before
    assert [norm.momentum for norm in batch_norms(model)] == [0.1, 0.1]


def test_no_images_change_nothing(tiny, snapshot):
    model = tiny().train()
    before = snapshot(model)
    assert reestimate_batchnorm_(model, []) == 0
    assert snapshot(model) == before


def test_only_statistics_change(tiny, images, snapshot):
    model = tiny()
    before, after = snapshot(model), None
    reestimate_batchnorm_(model, [images])
    after = snapshot(model)
    changed = {name for name in before["tensors"] if before["tensors"][name] != after["tensors"][name]}
    assert changed == {
        f"norm{index}.{name}" for index in range(4) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {**before, "tensors": None} == {**after, "tensors": None}


def test_gradients_are_not_recorded(tiny, images):
    model = tiny()
    reestimate_batchnorm_(model, [images])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norms_without_statistics_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4))
    assert batch_norms(model) == []
    assert reestimate_batchnorm_(model, [torch.randn(2, 3, 6, 6)]) == 2
    assert model[1].running_mean is None


def test_images_take_the_dtype_of_the_model():
    model = net().double()
    reestimate_batchnorm_(model, [torch.randn(8, 3, 6, 6)])
    assert model[1].running_mean.dtype == torch.float64


def test_shared_norm_is_listed_once():
    norm = nn.BatchNorm2d(3)
    assert batch_norms(nn.Sequential(norm, nn.ReLU(), norm)) == [norm]
