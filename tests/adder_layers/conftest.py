"""What the tests of this folder share: layer shapes, one tolerance table, and how results are compared."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Largest error allowed, as a share of the largest expected value. Half precision is compared with fp32
# arithmetic on the same rounded operands: what remains is rounding the result (2^-9 for bfloat16, 2^-12 for
# float16), and again where the bias is added.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Case(NamedTuple):
    """Shapes of input and weight, and the other arguments of the convolution."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    options: dict[str, Any]


CASES = {
    "1x1": Case((2, 5, 6, 7), (4, 5, 1, 1), {}),
    "3x3-stride2": Case((2, 3, 9, 9), (4, 3, 3, 3), {"stride": 2}),
    "3x3-padding1": Case((2, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    "padding-above-kernel": Case((2, 2, 3, 4), (3, 2, 2, 2), {"padding": 5}),
    "padding-above-kernel-stride3": Case((1, 2, 3, 2), (3, 2, 2, 3), {"padding": (4, 7), "stride": 3}),
    "groups2": Case((2, 6, 6, 5), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": Case((2, 5, 6, 6), (5, 1, 3, 3), {"groups": 5, "padding": 1}),
    "depthwise-multiplier3": Case((2, 3, 6, 6), (9, 1, 3, 3), {"groups": 3, "stride": 2}),
    "dilation2": Case((2, 3, 8, 9), (4, 3, 3, 3), {"dilation": 2, "padding": 2}),
    "non-square": Case((2, 3, 9, 12), (4, 3, 2, 5), {"stride": (3, 2), "padding": (1, 4), "dilation": (2, 1)}),
    "odd-sizes-left-over-pixels": Case((3, 3, 7, 11), (5, 3, 3, 2), {"stride": (2, 3)}),
    "one-pixel-output": Case((2, 3, 4, 5), (4, 3, 4, 5), {}),
    "one-pixel-input": Case((2, 3, 1, 1), (4, 3, 3, 3), {"padding": 1}),
    "stride-above-kernel": Case((2, 3, 9, 8), (4, 3, 1, 2), {"stride": (4, 3)}),
    "two-terms": Case((2, 3, 7, 6), (4, 3, 2, 3, 3), {"stride": 2, "padding": 1}),
    "three-terms-groups2": Case((2, 6, 5, 6), (4, 3, 3, 2, 3), {"groups": 2, "dilation": 2, "padding": (1, 2)}),
    "two-terms-depthwise": Case((2, 5, 6, 6), (10, 1, 2, 3, 3), {"groups": 5, "padding": 1}),
    "one-filter-one-channel": Case((1, 1, 5, 5), (1, 1, 3, 3), {"padding": 1}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def operands() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Random input, weight and bias of a case."""

    def draw(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (case.input, case.weight, case.weight[:1])
        input, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
        return input, weight, bias

    return draw


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare within the tolerance of the actual dtype; the expected values may have a wider one."""

    def compare(actual: Tensor, expected: Tensor) -> None:
        scale = expected.abs().max().item() if expected.numel() else 0.0
        allowed = TOLERANCE[actual.dtype] * max(scale, 1.0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=allowed, check_dtype=False)

    return compare


@pytest.fixture
def results() -> Callable[..., list[Tensor]]:
    """Output of a convolution and the gradients of its tensors, always for the same output gradient."""

    def run(function: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves, **options)
        grad = torch.linspace(-2, 2, output.numel(), dtype=torch.float64).sin().reshape(output.shape)
        # Rounded to bfloat16 so that the gradient is the same number in every dtype.
        grad = grad.to(torch.bfloat16).to(output.dtype)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    return run
