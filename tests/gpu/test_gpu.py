"""The GPU kernels on a real device: against the reference, compiled, repeated."""

import pytest
import torch

import adderkit
from adderkit.adder_layers.backends import choose_backend
from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.conv import adder_conv2d
from adderkit.adder_layers.reference import adder_conv2d_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.skipif(not gpu.available(), reason="needs Triton"),
]

# As a share of the largest expected value; the reference runs in fp64 on the same rounded operands.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MODES = {
    "fp32": (torch.float32, torch.contiguous_format),
    "fp32-channels-last": (torch.float32, torch.channels_last),
    "fp16": (torch.float16, torch.contiguous_format),
    "bf16-channels-last": (torch.bfloat16, torch.channels_last),
}
# name: input, weight, options
CASES = {
    "1x1": ((4, 64, 14, 14), (256, 64, 1, 1), {}),
    "3x3": ((4, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    "3x3-stride2": ((3, 48, 29, 31), (40, 48, 3, 3), {"stride": 2, "padding": 1}),
    "1x1-stride2": ((4, 32, 15, 15), (16, 32, 1, 1), {"stride": 2}),
    "cifar": ((16, 16, 32, 32), (16, 16, 3, 3), {"padding": 1}),
    "stem": ((2, 3, 33, 35), (32, 3, 7, 7), {"stride": 2, "padding": 3}),
    "groups": ((2, 32, 13, 11), (48, 16, 3, 3), {"groups": 2, "padding": 2, "dilation": 2}),
    "thin-groups": ((2, 32, 13, 11), (32, 4, 3, 3), {"groups": 8, "padding": 1}),
    "depthwise": ((2, 40, 15, 17), (40, 1, 3, 3), {"groups": 40, "padding": 1}),
    "depthwise-stride2": ((2, 24, 16, 15), (48, 1, 5, 5), {"groups": 24, "stride": 2, "padding": 2}),
    "non-square": ((2, 9, 19, 12), (17, 9, 2, 5), {"stride": (3, 2), "padding": (1, 4), "dilation": (2, 1)}),
    "padding-above-kernel": ((2, 8, 3, 4), (8, 8, 2, 2), {"padding": 5}),
}


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    """The weight gradient is a convolution's, which torch computes in TF32 unless told otherwise."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _results(function, grad, *tensors, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output))]


def _assert_close(actual, expected, tolerance):
    for name, got, wanted in zip(("output", "input", "weight", "bias"), actual, expected, strict=False):
        allowed = tolerance * max(1.0, wanted.abs().max().item())
        assert (got.cpu().double() - wanted.cpu()).abs().max().item() <= allowed, name


@pytest.mark.parametrize(("dtype", "memory_format"), MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize(("input_shape", "weight_shape", "options"), CASES.values(), ids=CASES.keys())
def test_every_case(input_shape, weight_shape, options, dtype, memory_format):
    input = torch.randn(input_shape).to(dtype).to("cuda", memory_format=memory_format)
    weight, bias = torch.randn(weight_shape).to("cuda", dtype), torch.randn(weight_shape[0]).to("cuda", dtype)
    assert choose_backend("cuda", dtype) is gpu
    wide = [tensor.cpu().double() for tensor in (input, weight, bias)]
    grad = torch.randn_like(adder_conv2d_reference(*wide, **options)).bfloat16()
    expected = _results(adder_conv2d_reference, grad, *wide, **options)
    actual = _results(adder_conv2d, grad, input, weight, bias, **options)
    assert actual[0].is_contiguous(memory_format=memory_format)
    assert all(tensor.dtype == dtype for tensor in actual)
    _assert_close(actual, expected, TOLERANCE[dtype])


def test_kinks_are_exact():
    input = torch.randint(-1, 2, (2, 16, 9, 9), device="cuda").float()
    weight = torch.randint(-1, 2, (16, 16, 3, 3), device="cuda").float()
    grad = torch.randint(-4, 5, (2, 16, 7, 7), device="cuda")
    wide = (input.cpu().double(), weight.cpu().double())
    actual = _results(adder_conv2d, grad, input, weight)
    for got, wanted in zip(actual[:2], _results(adder_conv2d_reference, grad.cpu(), *wide), strict=False):
        assert torch.equal(got.cpu().double(), wanted)


@pytest.mark.parametrize("groups", [1, 32])
def test_two_runs_give_the_same_bits(groups):
    input = torch.randn(8, 32, 28, 28, device="cuda")
    weight = torch.randn(32, 32 // groups, 3, 3, device="cuda")
    grad = torch.randn(8, 32, 28, 28, device="cuda")
    first, second = (_results(adder_conv2d, grad, input, weight, padding=1, groups=groups) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_gradient_of_a_sum_has_no_strides():
    """The gradient of ``y.sum()`` is one number seen everywhere: its strides are 0."""
    input = torch.randn(2, 16, 9, 9, device="cuda", requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, device="cuda")
    adder_conv2d(input, weight, padding=1).sum().backward()
    leaf = input.detach().cpu().double().requires_grad_()
    adder_conv2d_reference(leaf, weight.cpu().double(), padding=1).sum().backward()
    torch.testing.assert_close(input.grad.cpu().double(), leaf.grad, rtol=0, atol=1e-3)


def test_not_a_number_comes_through():
    input = torch.randn(1, 16, 5, 5, device="cuda")
    input[0, 0, 2, 2] = float("nan")
    leaf = input.requires_grad_()
    output = adder_conv2d(leaf, torch.randn(16, 16, 3, 3, device="cuda"))
    output.nansum().backward()
    assert output[0, 0, 1, 1].isnan()
    assert leaf.grad[0, 0, 2, 2].isnan()


def test_autocast_keeps_a_narrow_input_and_gives_a_wide_output():
    input = torch.randn(2, 16, 9, 9, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(16, 16, 3, 3, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        output = adder_conv2d(input, weight, padding=1)
    grad = torch.randn_like(output).bfloat16().float()
    actual = [output.detach(), *torch.autograd.grad(output, (input, weight), grad)]
    assert output.dtype == torch.float32
    wide = [tensor.detach().cpu().double() for tensor in (input, weight)]
    expected = _results(adder_conv2d_reference, grad.cpu(), *wide, padding=1)
    for got, wanted, dtype in zip(actual, expected, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        _assert_close([got], [wanted], TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [1, 16])
def test_operator_keeps_torchs_rules(groups):
    input = torch.randn(2, 16, 9, 9, device="cuda", requires_grad=True)
    weight = torch.randn(16, 16 // groups, 3, 3, device="cuda", requires_grad=True)
    arguments = (input, weight, None, [1, 1], [1, 1], [1, 1], groups)
    torch.library.opcheck(torch.ops.adderkit.adder_conv2d.default, arguments)


def test_compiled_model_matches():
    layer = adderkit.AdderConv2d(16, 32, 3, padding=1).cuda()
    model = torch.nn.Sequential(layer, torch.nn.BatchNorm2d(32).cuda(), torch.nn.ReLU())
    input = torch.randn(4, 16, 14, 14, device="cuda")
    expected = model(input)
    actual = torch.compile(model, fullgraph=True)(input)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_no_buffer_of_unfolded_windows():
    input, weight = torch.randn(4, 64, 56, 56, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    adder_conv2d(input, weight, padding=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = adder_conv2d(input, weight, padding=1)
    extra = torch.cuda.max_memory_allocated() - before - output.numel() * 4
    assert extra <= 0.05 * input.numel() * 4 + (1 << 20)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    input = torch.zeros(1, 16, 12000, 12000, device="cuda", dtype=torch.float16)
    input[0, :, -1, -1] = 2
    weight = torch.zeros(8, 16, 1, 1, device="cuda", dtype=torch.float16)
    output = adder_conv2d(input, weight)
    assert output[0, :, -1, -1].eq(-32).all()
    assert output[0, :, :-1].eq(0).all()
