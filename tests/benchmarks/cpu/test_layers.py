"""What the kernel benchmark compares computes the same thing, and its arithmetic is right."""

import pytest
import torch
import torch.nn.functional as F

from adderkit.adder_layers.reference import adder_conv2d_reference
from benchmarks.cpu import kernels
from benchmarks.cpu.layers import Layer, layers_of, providers
from benchmarks.timing import interleaved, peak_bytes, quantiles

LAYERS = [
    Layer("none", (2, 3, 7, 9), (4, 3, 3, 3), 2, 1, 1),
    Layer("none", (2, 4, 5, 6), (6, 4, 1, 1), 1, 0, 1),
    Layer("none", (2, 4, 5, 6), (4, 1, 3, 3), 1, 1, 4),
]


@pytest.mark.parametrize("layer", LAYERS)
def test_providers_compute_the_same(layer):
    torch.manual_seed(0)
    x, w = torch.randn(layer.input, requires_grad=True), torch.randn(layer.weight, requires_grad=True)
    expected = adder_conv2d_reference(x, w, None, layer.stride, layer.padding, 1, layer.groups)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, w), grad)
    found = providers(layer)
    assert set(found) == ({"adder", "conv", "cdist", "published"} if layer.groups == 1 else {"adder", "conv"})
    for name in ("adder", "published", "cdist"):
        if name in found:
            output = found[name](x, w)
            torch.testing.assert_close(output, expected)
            if name != "cdist":  # torch's distance has its own derivative
                torch.testing.assert_close(torch.autograd.grad(output, (x, w), grad), gradients)
    wanted = F.conv2d(x, w, None, layer.stride, layer.padding, 1, layer.groups)
    torch.testing.assert_close(found["conv"](x, w), wanted)
    assert layer.terms == expected.numel() * w[0].numel()


def test_what_needs_too_much_memory_is_left_out():
    assert set(providers(Layer("none", (256, 64, 56, 56), (256, 64, 3, 3), 1, 1, 1))) == {"adder", "conv", "cdist"}


def test_distinct_layers_of_a_network():
    layers = layers_of("cifar_resnet20", "cpu")
    assert len(layers) == len(set(layers)) == 7
    assert {layer.input[0] for layer in layers} == {128}
    assert Layer("cifar_resnet20", (128, 16, 32, 32), (32, 16, 1, 1), 2, 0, 1) in layers


def test_slow_functions_are_called_less_often_and_all_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr("benchmarks.timing._seconds", lambda function, _: function())
    durations = {"quick": 0.1, "slow": 1.0, "slowest": 9.0}
    timed = {name: lambda name=name, value=value: calls.append(name) or value for name, value in durations.items()}
    seconds = interleaved(timed, "cpu", 5)
    assert {name: len(values) for name, values in seconds.items()} == {"quick": 5, "slow": 3, "slowest": 1}
    # The first turn warms up; it is all that the slowest gets.
    assert calls == ["quick", "slow", "slowest", *["quick", "slow"] * 3, *["quick"] * 2]


def test_quantiles():
    assert quantiles([4.0]) == [4.0, 4.0, 4.0]
    assert quantiles([0.0, 5.0, 1.0, 4.0, 2.0, 3.0]) == [1.0, 2.5, 4.0]


def test_peak_memory_sees_a_temporary():
    peak = peak_bytes(lambda: torch.zeros(1 << 24).add_(1).sum(), "cpu")
    assert peak is None or 0.9 * (1 << 26) < peak < 1.5 * (1 << 26)


def test_summary_is_a_geometric_mean_of_ratios():
    def row(**values):
        rates = {name: {pass_: [0, rate, 0] for pass_ in kernels.PASSES} for name, rate in values.items()}
        return {"giga_terms_per_second": rates}

    means = kernels.summarize([row(adder=1, conv=2), row(adder=8, conv=4)], {"forward": 8.0})
    assert means["adder / conv, training step"] == pytest.approx(1.0)
    assert means["share of the limit, forward"] == pytest.approx((1 / 8 * 1) ** 0.5)
    assert "adder / cdist, forward" not in means
