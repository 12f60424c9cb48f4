"""The operators and the function: values and gradients against the reference, and how they fit into torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from adderkit.adder_layers.conv import adder_conv2d
from adderkit.adder_layers.geometry import pair, terms_first
from adderkit.adder_layers.reference import adder_conv2d_reference

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
operator = torch.ops.adderkit.adder_conv2d.default
input_grad_operator = torch.ops.adderkit.adder_conv2d_input_grad.default


@pytest.fixture
def assert_matches_reference(results, assert_close):
    """Compare output and all gradients with the reference, computed at least in fp32 on the same numbers."""

    def check(*tensors, **options):
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
        actual = results(adder_conv2d, *tensors, **options)
        expected = results(adder_conv2d_reference, *wide, **options)
        assert len(actual) == len(expected) == len(tensors) + 1
        for ours, reference in zip(actual, expected, strict=True):
            assert ours.dtype == tensors[0].dtype
            assert_close(ours, reference)

    return check


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_equal_the_reference(case, operands, assert_matches_reference, dtype, with_bias):
    tensors = operands(case, dtype)
    assert_matches_reference(*(tensors if with_bias else tensors[:2]), **case.options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_thousands_of_terms(assert_matches_reference, dtype):
    input, weight = torch.randn(1, 512, 3, 3).to(dtype), torch.randn(4, 512, 3, 3).to(dtype)
    assert_matches_reference(input, weight)


def test_padded_taps_count_the_size_of_the_weight():
    weight = torch.tensor([1.0, -2, 4, 8, 0.5, -16, 32, -64, 128]).reshape(1, 1, 3, 3)
    output = adder_conv2d(torch.zeros(1, 1, 1, 1), weight, padding=1)
    assert output.item() == -weight.abs().sum().item()


def test_a_window_that_equals_the_filter_has_distance_zero():
    weight = torch.randn(3, 4, 3, 3)
    output = adder_conv2d(weight, weight).reshape(3, 3)
    assert torch.equal(output.diagonal(), torch.zeros(3))
    assert (output[~torch.eye(3, dtype=torch.bool)] < 0).all()


def test_batch_of_zero_images():
    input = torch.randn(0, 3, 5, 5, requires_grad=True)
    weight, bias = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    output = adder_conv2d(input, weight, bias)
    output.sum().backward()
    assert output.shape == (0, 4, 3, 3)
    assert input.grad.shape == input.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_unbatched_input_equals_a_batch_of_one(results, padding):
    input, weight, bias = torch.randn(3, 6, 5), torch.randn(4, 3, 3, 2), torch.randn(4)
    output, input_grad, *others = results(adder_conv2d, input, weight, bias, padding=padding)
    batched, batched_grad, *expected = results(adder_conv2d, input[None], weight, bias, padding=padding)
    assert torch.equal(output, batched[0])
    assert torch.equal(input_grad, batched_grad[0])
    assert all(map(torch.equal, others, expected))


# Memory layout


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 5, 3, 2).permute(3, 2, 1, 0),
    "sliced": lambda: torch.randn(4, 5, 12, 9)[::2, 1:4, ::2, 2:],
    "expanded-batch": lambda: torch.randn(1, 3, 6, 6).expand(3, -1, -1, -1),
    "expanded-channels": lambda: torch.randn(2, 1, 6, 6).expand(-1, 3, -1, -1),
    "channels-last": lambda: torch.randn(2, 3, 6, 7).contiguous(memory_format=torch.channels_last),
}
layouts = pytest.mark.parametrize("make_input", LAYOUTS.values(), ids=LAYOUTS.keys())


@layouts
def test_layout_of_the_input_does_not_matter(make_input, assert_matches_reference):
    assert_matches_reference(make_input(), torch.randn(4, 3, 3, 3), torch.randn(4), padding=1, stride=(2, 1))


@layouts
def test_layout_of_the_weight_does_not_matter(make_input, assert_matches_reference):
    weight = make_input()
    assert_matches_reference(torch.randn(2, 3, 9, 9), weight, torch.randn(len(weight)), padding=1)


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=["odd-kernel", "even-kernel"])
def test_channels_last_in_channels_last_out(padding, kernel):
    input = torch.randn(2, 4, 6, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = adder_conv2d(input, torch.randn(5, 4, *kernel), torch.randn(5), padding=padding)
    output.square().sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()
    assert input.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_cropped_channels_last_input_stays_channels_last_as_in_conv2d():
    input = torch.randn(2, 4, 7, 7).contiguous(memory_format=torch.channels_last)[:, :, 1:, :-1]
    weight = torch.randn(5, 4, 3, 3)
    assert F.conv2d(input, weight).is_contiguous(memory_format=torch.channels_last)
    assert adder_conv2d(input, weight).is_contiguous(memory_format=torch.channels_last)


GRADS = {
    "expanded": lambda shape: torch.ones(()).expand(shape),
    "transposed": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
    "channels-last": lambda shape: torch.randn(shape).contiguous(memory_format=torch.channels_last),
    "sliced": lambda shape: torch.randn(*shape[:3], 2 * shape[3])[..., ::2],
}


@pytest.mark.parametrize("make_grad", GRADS.values(), ids=GRADS.keys())
def test_layout_of_the_output_gradient_does_not_matter(assert_close, make_grad):
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 4, 6, 6), (6, 2, 3, 3), (6,))]
    options = {"padding": 1, "stride": 2, "groups": 2}
    grad = make_grad((2, 6, 3, 3))
    actual = torch.autograd.grad(adder_conv2d(*leaves, **options), leaves, grad)
    expected = torch.autograd.grad(adder_conv2d_reference(*leaves, **options), leaves, grad)
    for ours, reference in zip(actual, expected, strict=True):
        assert_close(ours, reference)


# Gradients are AdderNet's, not the derivative's


# Quarters are exact in every dtype, and so are their sums and products here: results must be exact too.
def quarters(*shape, dtype):
    return torch.randint(-7, 8, shape).to(dtype) / 4


@pytest.mark.parametrize(("gap", "slope"), [(0, 0), (0.5, 0.5), (-0.5, -0.5), (1, 1), (-1, -1), (1.25, 1), (-1.25, -1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient_is_exact_at_and_around_the_bends(dtype, gap, slope):
    weight = quarters(1, 3, 1, 1, dtype=dtype)
    input = (weight - gap).expand(2, 3, 4, 5).clone().requires_grad_()
    grad = quarters(2, 1, 4, 5, dtype=dtype)
    adder_conv2d(input, weight).backward(grad)
    assert torch.equal(input.grad, (slope * grad).expand_as(input))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients_are_zero_where_input_equals_weight(dtype):
    weight = quarters(1, 3, 1, 1, dtype=dtype).requires_grad_()
    input = weight.detach().expand(2, 3, 4, 5).clone().requires_grad_()
    output = adder_conv2d(input, weight)
    output.backward(quarters(2, 1, 4, 5, dtype=dtype))
    for zeros in (output, input.grad, weight.grad):
        assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("gap", [1, -1, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient_keeps_its_full_size_at_the_bends(dtype, gap):
    weight = quarters(1, 3, 1, 1, dtype=dtype).requires_grad_()
    grad = quarters(1, 1, 3, 3, dtype=dtype)
    adder_conv2d((weight.detach() + gap).expand(1, 3, 3, 3), weight).backward(grad)
    assert torch.equal(weight.grad, (gap * grad.sum()).expand_as(weight))


def matches_derivative(*tensors):
    return torch.autograd.gradcheck(adder_conv2d, tensors, raise_exception=False)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("leaf", [0, 1], ids=["input", "weight"])
def test_gradcheck_fails_because_the_gradient_is_a_surrogate(leaf):
    # The derivative of -|x - w| is a sign. Training uses HardTanh(w - x) and x - w instead (AdderNet, section
    # 3.2), so an implementation that passes gradcheck here has lost the published gradients.
    tensors = [double(1, 2, 4, 4), double(3, 2, 2, 2)]
    tensors[leaf].requires_grad_()
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(adder_conv2d, tensors)


def test_gradcheck_passes_where_surrogate_and_derivative_agree():
    input, weight = double(1, 2, 4, 4), double(3, 2, 2, 2)
    assert matches_derivative(input, weight, double(3).requires_grad_())
    # More than 1 apart, HardTanh is the sign; exactly 1 apart, so is x - w, on either side.
    far = input.clamp(-1, 1).requires_grad_()
    assert matches_derivative(far, weight.clamp(-1, 1) + 4)
    side = torch.randint(0, 2, weight.shape).double() * 2 - 1
    assert matches_derivative(torch.zeros_like(input), side.requires_grad_())


# Named padding


@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 2), (4, 3), (3, 4), (5, 2)], ids=str)
def test_same_padding(results, assert_close, kernel, dilation):
    tensors = double(2, 3, 8, 9), double(4, 3, *kernel), double(4)

    def reference(input, weight, bias):
        # torch.nn.functional.conv2d puts the odd zero below and to the right.
        rows, columns = (dil * (k - 1) for dil, k in zip(pair(dilation), kernel, strict=True))
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return adder_conv2d_reference(F.pad(input, sides), weight, bias, dilation=dilation)

    actual = results(adder_conv2d, *tensors, padding="same", dilation=dilation)
    assert actual[0].shape == (2, 4, 8, 9)
    for ours, expected in zip(actual, results(reference, *tensors), strict=True):
        assert_close(ours, expected)


def test_valid_padding_is_none(results):
    tensors = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 2)
    named = results(adder_conv2d, *tensors, padding="valid", stride=2)
    assert all(map(torch.equal, named, results(adder_conv2d, *tensors, padding=0, stride=2)))


# Torch around it


def contiguous(tensor):
    return tensor


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_opcheck_of_the_forward_operator(layout, groups, with_bias):
    input = layout(torch.randn(2, 4, 6, 5)).requires_grad_()
    weight = torch.randn(6, 4 // groups, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True) if with_bias else None
    torch.library.opcheck(operator, (input, weight, bias, [2, 1], [1, 2], [1, 1], groups))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_input_gradient_operator(layout, groups, dtype):
    input, weight = layout(torch.randn(2, 4, 6, 5)).to(dtype), torch.randn(6, 4 // groups, 3, 3).to(dtype)
    grad = torch.randn(2, 6, 3, 7).to(dtype)
    torch.library.opcheck(input_grad_operator, (grad, input, weight, [2, 1], [1, 2], [1, 1], groups))


def test_meta_tensors_give_shapes(case, operands):
    tensors = [tensor.to("meta").requires_grad_() for tensor in operands(case)]
    output = adder_conv2d(*tensors, **case.options)
    output.sum().backward()
    input, weight, bias = tensors
    assert output.shape == F.conv2d(input, terms_first(weight)[0], bias, **case.options).shape
    assert output.is_meta
    assert [tensor.grad.shape for tensor in tensors] == [tensor.shape for tensor in tensors]


def test_same_input_gives_the_same_bits(results):
    torch.set_num_threads(2)
    tensors = torch.randn(8, 16, 20, 20), torch.randn(16, 16, 3, 3), torch.randn(16)
    first, second = (results(adder_conv2d, *tensors, padding=1) for _ in range(2))
    assert all(map(torch.equal, first, second))


class Recorder(TorchDispatchMode):
    """Remembers which operators ran."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("leaf", "unneeded"),
    [("input", torch.ops.aten.convolution_backward.default), ("weight", input_grad_operator)],
    ids=["frozen-weight", "input-without-gradient"],
)
def test_an_unneeded_gradient_is_not_computed(leaf, unneeded):
    tensors = {"input": torch.randn(1, 2, 4, 4), "weight": torch.randn(3, 2, 3, 3)}
    tensors[leaf].requires_grad_()
    output = adder_conv2d(**tensors)
    with Recorder() as recorder:
        output.sum().backward()
    assert tensors[leaf].grad is not None
    assert recorder.seen & {torch.ops.aten.convolution_backward.default, input_grad_operator}
    assert unneeded not in recorder.seen


# Autocast


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_fp32(results, input_dtype):
    input, weight, bias = torch.randn(2, 3, 6, 6).to(input_dtype), torch.randn(4, 3, 3, 3), torch.randn(4)
    leaves = [tensor.requires_grad_() for tensor in (input, weight, bias)]
    with autocast():
        output = adder_conv2d(*leaves, padding=1)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves, grad)

    wide = [tensor.detach().float().requires_grad_() for tensor in leaves]
    expected = adder_conv2d(*wide, padding=1)
    expected_grads = torch.autograd.grad(expected, wide, grad)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    assert [g.dtype for g in grads] == [input_dtype, torch.float32, torch.float32]
    assert torch.equal(grads[0], expected_grads[0].to(input_dtype))
    assert all(map(torch.equal, grads[1:], expected_grads[1:]))


def test_backward_inside_autocast_computes_in_fp32():
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6, 6), (4, 3, 3, 3), (4,))]
    output = adder_conv2d(*leaves, padding=1)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    with autocast():
        actual = torch.autograd.grad(output, leaves, grad)
    assert all(map(torch.equal, actual, expected))


def test_autocast_leaves_float64_alone_as_in_conv2d():
    input, weight = double(1, 2, 4, 4), double(3, 2, 3, 3)
    with autocast():
        assert F.conv2d(input, weight).dtype == torch.float64
        assert adder_conv2d(input, weight).dtype == torch.float64


def test_autocast_does_not_let_integers_in():
    input, weight = torch.ones(1, 2, 4, 4, dtype=torch.int64), torch.ones(3, 2, 3, 3)
    with (
        autocast(),
        pytest.raises(TypeError, match=r"input has dtype torch.int64, expected a floating-point"),
    ):
        adder_conv2d(input, weight)
