"""The adaptive local learning rate: the closed formula, and all that may come between backward and step."""

import copy

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from adderkit import AdaptiveRate, AdderConv2d
from adderkit.recipes.training.adaptive_rate import rescale_

ETA = 0.2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        AdderConv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        AdderConv2d(6, 2, 1, terms=2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


@pytest.fixture
def batch():
    return torch.randn(8, 3, 7, 7), torch.randint(0, 3, (8,))


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def adder_weights(model):
    return [layer.weight for layer in model.modules() if isinstance(layer, AdderConv2d)]


def state(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_equal(actual, expected, **tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance or {"rtol": 0, "atol": 0})


def step_by_formula(model, batch, lr):
    """One step of plain gradient descent with equations 12 and 13 written out."""
    grads = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    adders = {id(weight) for weight in adder_weights(model)}
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            alpha = ETA * grad.numel() ** 0.5 / grad.square().sum().sqrt() if id(parameter) in adders else 1.0
            parameter -= lr * alpha * grad


def test_a_step_is_the_paper_s(model, batch):
    expected = copy.deepcopy(model)
    step_by_formula(expected, batch, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model, ETA)
    loss_of(model, batch).backward()
    optimizer.step()
    assert_equal(state(model), state(expected), rtol=1e-5, atol=1e-7)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "timm-lamb": lambda parameters: timm.optim.create_optimizer_v2(parameters, "lamb", lr=0.1),
    "timm-nadamw": lambda parameters: timm.optim.create_optimizer_v2(parameters, "nadamw", lr=0.1),
    "timm-lookahead": lambda parameters: timm.optim.create_optimizer_v2(parameters, "lookahead_sgd", lr=0.1),
}


@pytest.mark.parametrize("eta", [0.1, 0.2])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_sees_the_scaled_gradient(model, batch, make, eta):
    optimizer = make(model.parameters())
    AdaptiveRate(optimizer, model, eta)
    loss_of(model, batch).backward()
    before = [weight.grad.clone() for weight in adder_weights(model)]
    optimizer.step()
    for weight, grad in zip(adder_weights(model), before, strict=True):
        torch.testing.assert_close(weight.grad.norm(), torch.tensor(eta * weight.numel() ** 0.5))
        torch.testing.assert_close(weight.grad / weight.grad.norm(), grad / grad.norm())


def test_only_adder_layers_are_touched(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model)
    loss_of(model, batch).backward()
    adders = {id(weight) for weight in adder_weights(model)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in adders]
    before = [parameter.grad.clone() for parameter in others]
    optimizer.step()
    assert len(others) == len(list(model.parameters())) - 2
    assert_equal([parameter.grad for parameter in others], before)


def trained(model, steps, **rate):
    """The adder weights after a few steps, ``steps(model, optimizer)`` each."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(adder_weights(model), lr=0.1, momentum=0.9)
    AdaptiveRate(optimizer, model, **rate)
    for _ in range(3):
        steps(model, optimizer)
        optimizer.zero_grad()
    return adder_weights(model)


@pytest.mark.parametrize("scale", [2.0**-16, 65536.0, 3.0])
def test_the_step_does_not_depend_on_the_scale_of_the_loss(model, batch, scale):
    def step(factor):
        def once(model, optimizer):
            (loss_of(model, batch) * factor).backward()
            optimizer.step()

        return once

    assert_equal(trained(model, step(scale)), trained(model, step(1.0)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscale_first", [False, True], ids=["step", "unscale-clip-step"])
def test_behind_a_gradient_scaler(model, batch, fused, unscale_first):
    expected, weights = copy.deepcopy(model), adder_weights(model)
    step_by_formula(expected, batch, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(weights, lr=0.1, fused=fused)
    AdaptiveRate(optimizer, model)
    scaler.scale(loss_of(model, batch)).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert_equal(weights, adder_weights(expected), rtol=1e-5, atol=1e-6)


def test_a_scaler_skips_the_step_of_an_overflow(model, batch):
    before = state(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model)
    scaler.scale(loss_of(model, batch) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(state(model), before)
    assert scaler.get_scale() == 32768.0


def test_clipping_before_does_not_change_the_step(model, batch):
    def step(largest):
        def once(model, optimizer):
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(adder_weights(model), largest)
            optimizer.step()

        return once

    assert_equal(trained(model, step(1e-3)), trained(model, step(1e9)), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_are_rescaled_once(model, batch):
    def whole(model, optimizer):
        loss_of(model, batch).backward()
        optimizer.step()

    def accumulated(model, optimizer):
        for part in range(4):
            (loss_of(model, tuple(tensor[2 * part : 2 * part + 2] for tensor in batch)) / 4).backward()
        optimizer.step()

    assert_equal(trained(model, accumulated), trained(model, whole), rtol=1e-4, atol=1e-5)


def test_within_autograd_accumulation_would_be_another_step(model, batch):
    """As published: each part of the batch has its own norm. The parts are given gradients of very different sizes."""
    images, labels = batch
    parts = [(images[:4], labels[:4]), (100 * images[4:], labels[4:])]

    def grads(of, rescaled):
        network = copy.deepcopy(model)
        if rescaled:
            for weight in adder_weights(network):
                weight.register_hook(lambda grad: rescale_(scaled := grad.clone(), ETA) or scaled)
        for part in of:
            (loss_of(network, part) * len(part[1]) / 8).backward()
        return [weight.grad for weight in adder_weights(network)]

    whole = (torch.cat([parts[0][0], parts[1][0]]), labels)
    assert_equal(grads(parts, False), grads([whole], False), rtol=1e-4, atol=1e-5)
    for accumulated, once in zip(grads(parts, True), grads([whole], True), strict=True):
        assert (accumulated - once).norm() > 0.2 * once.norm()


def test_behind_accelerate(model, batch):
    expected = copy.deepcopy(model)
    step_by_formula(expected, batch, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(loss_of(prepared, batch))
    optimizer.step()
    assert_equal(state(model), state(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30], ids=["zero", "nearly-zero"])
def test_no_gradient_stays_none(dtype, value):
    grad = torch.full((64, 64, 3, 3), value, dtype=dtype)
    rescale_(grad, ETA)
    assert grad.isfinite().all()
    assert grad.float().abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_reach_full_size_in_any_precision(dtype):
    torch.manual_seed(0)
    grad = (torch.randn(64, 64, 3, 3) * 1e-6).to(dtype)
    direction = grad.float() / grad.float().norm()
    rescale_(grad, ETA)
    assert grad.float().norm().item() == pytest.approx(ETA * grad.numel() ** 0.5, rel=1e-2)
    assert F.cosine_similarity(grad.float().flatten(), direction.flatten(), dim=0) > 0.99


def test_a_layer_without_gradient_is_left_out(model, batch):
    first, second = adder_weights(model)
    first.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model)
    loss_of(model, batch).backward()
    optimizer.step()
    assert first.grad is None
    assert second.grad.norm().item() == pytest.approx(ETA * second.numel() ** 0.5, rel=1e-5)


def test_weights_instead_of_a_model(model, batch):
    first, second = adder_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, iter([second]))
    loss_of(model, batch).backward()
    before = first.grad.clone()
    optimizer.step()
    assert torch.equal(first.grad, before)
    assert second.grad.norm().item() == pytest.approx(ETA * second.numel() ** 0.5, rel=1e-5)


def test_remove_leaves_the_optimizer_as_it_was(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    AdaptiveRate(optimizer, model).remove()
    loss_of(model, batch).backward()
    before = [weight.grad.clone() for weight in adder_weights(model)]
    optimizer.step()
    assert_equal([weight.grad for weight in adder_weights(model)], before)


@pytest.mark.parametrize("eta", [0.0, -0.2, float("nan")])
def test_eta_must_be_positive(model, eta):
    with pytest.raises(ValueError, match=r"eta is .*expected a positive number"):
        AdaptiveRate(torch.optim.SGD(model.parameters(), lr=0.1), model, eta)


@pytest.mark.parametrize("nothing", [nn.Conv2d(1, 1, 1), []], ids=["a-cnn", "no-weights"])
def test_a_model_without_adder_layers_is_refused(model, nothing):
    with pytest.raises(ValueError, match="no adder layer"):
        AdaptiveRate(torch.optim.SGD(model.parameters(), lr=0.1), nothing)
