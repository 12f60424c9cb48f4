"""The contract that all backends share, and the choice among them."""

import inspect

import pytest
import torch

from adderkit.adder_layers.backends import Backend, blocked, choose_backend, cpu
from adderkit.adder_layers.backends.triton import launch
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.reference import adder_conv2d_reference


@pytest.mark.parametrize("function", ["forward", "input_grad"])
@pytest.mark.parametrize("backend", [blocked, cpu, launch], ids=lambda module: module.__name__.rpartition(".")[2])
def test_signatures_are_those_of_the_protocol(backend, function):
    expected = list(inspect.signature(getattr(Backend, function)).parameters)[1:]
    assert list(inspect.signature(getattr(backend, function)).parameters) == expected


@pytest.mark.parametrize("backend", [blocked, cpu], ids=["blocked", "cpu"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 3)], ids=["every-pixel-read", "unread-pixels"])
def test_results_are_overwritten(backend, kernel, stride, assert_close):
    if backend is cpu and cpu.instruction_set() is None:
        pytest.skip("the C++ extension is not in use")
    input, weight = torch.randn(2, 4, 8, 7, requires_grad=True), torch.randn(6, 2, kernel, kernel)
    expected = adder_conv2d_reference(input, weight, stride=stride, groups=2)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    output, result = torch.full_like(expected, torch.nan), torch.full_like(input, torch.nan)
    window = Window.of(weight, (stride, stride), (0, 0), (1, 1))
    backend.forward(input.detach(), weight[None], output, window, 2)
    backend.input_grad(grad, input.detach(), weight[None], result, window, 2)
    assert_close(output, expected.detach())
    assert_close(result, input.grad)


def test_double_precision_is_computed_in_plain_torch():
    assert choose_backend("cpu", torch.float64) is choose_backend("cuda", torch.float64) is blocked


def test_every_other_dtype_takes_the_kernels_of_its_device(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_set", lambda: "baseline")
    monkeypatch.setattr(launch, "available", lambda: True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert choose_backend("cpu", dtype) is cpu
        assert choose_backend("cuda", dtype) is launch
        assert choose_backend("mps", dtype) is blocked


def test_plain_torch_serves_where_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_set", lambda: None)
    monkeypatch.setattr(launch, "available", lambda: False)
    assert choose_backend("cpu", torch.float32) is choose_backend("cuda", torch.float32) is blocked
