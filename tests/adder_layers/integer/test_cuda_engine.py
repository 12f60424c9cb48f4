"""The GPU engine without a GPU: its kernels interpreted, all else on the CPU, against the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer import reference
from adderkit.adder_layers.integer.cuda_engine import CudaEngine
from adderkit.adder_layers.integer.plan import Adder, Convolution
from adderkit.adder_layers.integer.triton_launch import words
from tests.adder_layers.integer.random_plans import LAYERS, Builder, single, square

SCRIPT = Path(__file__).with_name("interpreted_plans.py")
# Between them both kernels, whole and broken words and tiles, groups of either kind, and every kind of requantization.
SAMPLE = [
    "pointwise",
    "pointwise-odd-channels",
    "5x3-asymmetric",
    "one-channel",
    "groups-of-three",
    "depthwise-stride2",
    "depthwise-doubling",
    "four-bits",
    "two-terms-pointwise",
    "three-terms-groups",
    "three-terms-depthwise",
    "residual_network",
    "in-parts",
]


def _interpret(names):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(checks) == len(names)
    for check in checks:
        assert check["same"], check
        assert check["distinct"] > 10, check


def test_adder_layers_and_a_network_are_bit_equal():
    _interpret(SAMPLE)


@pytest.mark.slow
def test_all_adder_layers_and_networks_are_bit_equal():
    _interpret([*LAYERS, "plain_network"])


def _assert_equal(builder):
    plan, image = builder.plan(), builder.image()
    expected = reference.run(plan, image)
    actual = CudaEngine(plan, "cpu").run(image)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    assert expected.unique().numel() > 1


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_convolutions(layer):
    _assert_equal(single(Convolution, layer))


@pytest.mark.parametrize(
    ("window", "size"),
    [
        (square(3, 2, 1), None),
        (square(2, 2), (5, 4)),  # both rounded up
        (Window((3, 2), (1, 2), (1, 0), (2, 1)), None),
    ],
)
def test_max_pooling(window, size):
    builder = Builder(5, 9, 7)
    builder.max_pool(window, size)
    _assert_equal(builder)


def test_average_pooling_rescaling_and_classifier():
    builder = Builder(6, 9, 8)
    builder.rescale()
    builder.rescale(residual=1)
    builder.average_pool((3, 2), (2, 3))
    builder.linear(7)
    _assert_equal(builder)


def test_real_images_become_bytes_as_the_reference_says():
    plan = single(Convolution, LAYERS["7x7-stem"]).plan()
    first = plan.activations[0]
    images = torch.randn(2, 3, 20, 18, generator=torch.Generator().manual_seed(0)) * 9
    expected = reference.run(plan, reference.quantize(images, first.scale, first.zero_point))
    engine = CudaEngine(plan, "cpu")
    assert torch.equal(engine.run_float(images), expected)
    with pytest.raises(TypeError, match="expected floating point; run takes bytes"):
        engine.run_float(images.byte())
    with pytest.raises(ValueError, match=r"image has shape \(2, 3, 18, 20\), expected \[N, 3, 20, 18\]"):
        engine.run_float(images.transpose(2, 3))


def test_words_hold_four_neighbors_and_zeros_behind_them():
    packed = words(torch.tensor([[1, 2, 3, 4, 5, 255]], dtype=torch.uint8))
    assert packed.tolist() == [[0x04030201, 0xFF05]]


def test_an_image_is_refused_by_what_it_is():
    engine = CudaEngine(single(Convolution, LAYERS["3x3"]).plan(), "cpu")
    with pytest.raises(ValueError, match=r"image has shape \(2, 8, 11, 3\), expected \[N, 8, 11, 16\]"):
        engine.run(torch.zeros(2, 8, 11, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"image has dtype torch.float32, expected torch.uint8"):
        engine.run(torch.zeros(2, 8, 11, 16))
    with pytest.raises(ValueError, match="image is on meta, expected cpu"):
        engine.run(torch.zeros(2, 8, 11, 16, dtype=torch.uint8, device="meta"))


def test_a_plan_that_does_not_fit_together_is_refused():
    plan = single(Adder, LAYERS["3x3"]).plan()
    with pytest.raises(ValueError, match="plan has 1 steps and 0 paths"):
        CudaEngine(type(plan)(plan.activations, plan.steps, ()), "cpu")


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "available", lambda: False)
    with pytest.raises(ImportError, match=r"Triton is not installed.*pip install triton"):
        CudaEngine(single(Convolution, LAYERS["3x3"]).plan(), "cpu")
