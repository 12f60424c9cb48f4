"""Quantized networks on a real device: every byte as the reference has it."""

import pytest
import torch

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.cuda_engine import CudaEngine
from adderkit.adder_layers.integer.network import IntegerNetwork
from adderkit.adder_layers.integer.plan import Adder, Convolution
from tests.adder_layers.integer.random_plans import LAYERS, Layer, plain_network, residual_network, single, square

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.skipif(not gpu.available(), reason="needs Triton"),
]

LARGE = {
    "3x3-64": Layer(64, 64, square(3, padding=1), size=(28, 28), residual=True),
    "1x1-256-512": Layer(256, 512, square(1, 2), size=(14, 14)),
    "3x3-64-two-terms": Layer(64, 64, square(3, padding=1), size=(14, 14), residual=True, terms=2),
    "depthwise-96": Layer(96, 96, square(3, 2, 1), groups=96, size=(56, 57)),
}


def _assert_equal(builder, batch=2):
    plan, image = builder.plan(), builder.image(batch)
    expected = reference.run(plan, image)
    engine = CudaEngine(plan, "cuda")
    first, second = (engine.run(image.cuda()).cpu() for _ in range(2))
    assert first.dtype == expected.dtype
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("cls", [Adder, Convolution], ids=["adder", "convolution"])
def test_every_layer(layer, cls):
    _assert_equal(single(cls, layer))


@pytest.mark.parametrize("layer", LARGE.values(), ids=LARGE)
def test_large_layers(layer):
    _assert_equal(single(Adder, layer), batch=16)


@pytest.mark.parametrize("network", [residual_network, plain_network])
@pytest.mark.parametrize("batch", [1, 5])
def test_networks(network, batch):
    _assert_equal(network(), batch)


def test_the_extremes_of_the_sum():
    """All bytes 0 or 255 against 255 or 0: the largest sums that there are."""
    builder = single(Adder, Layer(512, 32, square(3, padding=1), size=(5, 5)))
    plan = builder.plan()
    plan.steps[0].weight.fill_(255)
    plan.activations[0].zero_point.zero_()
    image = torch.zeros(2, 5, 5, 512, dtype=torch.uint8)
    assert torch.equal(CudaEngine(plan, "cuda").run(image.cuda()).cpu(), reference.run(plan, image))


def test_a_network_moved_to_the_device_gives_the_same_logits():
    builder = residual_network()
    network = IntegerNetwork(builder.plan())
    images = torch.rand(3, 3, 23, 19) * 20
    expected = network(images)
    moved = network.to("cuda")
    assert isinstance(moved.engine, CudaEngine)
    assert torch.equal(moved(images.cuda()).cpu(), expected)
