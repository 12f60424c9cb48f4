"""The network of the benchmark of CIFAR-10, and its form for integers."""

import pytest
import torch

from adderkit.adder_layers.integer.network import IntegerNetwork
from benchmarks.accuracy.cifar10 import CifarResNet, Shortcut, quantized


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (3, 5, 1), (4, 4, 2)])
def test_shortcuts_as_convolutions_are_the_same(inputs, outputs, stride):
    shortcut, images = Shortcut(inputs, outputs, stride), torch.randn(2, inputs, 6, 8)
    assert torch.equal(shortcut.as_convolution()(images), shortcut(images))
    assert shortcut(images).shape == (2, outputs, 6 // stride, 8 // stride)


@torch.no_grad()
def test_integers_do_nearly_what_floats_did():
    model, images = CifarResNet(1).eval(), torch.randn(16, 3, 8, 8)
    network = quantized(model, images)
    assert isinstance(network, IntegerNetwork)
    found, expected = network(images).flatten(), model(images).flatten()
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.95
    assert any(isinstance(module, Shortcut) for module in model.modules())
