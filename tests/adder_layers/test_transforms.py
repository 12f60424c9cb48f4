"""The transforms of ``torch.func`` against loops over ``torch.autograd.grad``, and what is refused."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from adderkit.adder_layers.conv import AdderConv2d, adder_conv2d
from adderkit.adder_layers.reference import adder_conv2d_reference

OPTIONS = [{}, {"padding": 1, "stride": 2}, {"padding": (0, 1), "dilation": (1, 2), "groups": 2}]
options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "stride", "groups"])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def tensors(groups=1):
    return double(3, 4, 6, 7), double(6, 4 // groups, 3, 3), double(6)


def loss(convolve, input, weight, bias, **settings):
    output = convolve(input, weight, bias, **settings)
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).square().sum()


def expected_gradients(*leaves, **settings):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(loss(adder_conv2d_reference, *leaves, **settings), leaves)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@options
def test_grad_of_every_argument(options):
    leaves = tensors(options.get("groups", 1))
    actual = grad(lambda *leaves: loss(adder_conv2d, *leaves, **options), argnums=(0, 1, 2))(*leaves)
    assert_close(actual, expected_gradients(*leaves, **options))


@options
def test_gradients_of_single_samples(options):
    input, weight, bias = tensors(options.get("groups", 1))

    def of_one(weight, bias, sample):
        return loss(adder_conv2d, sample[None], weight, bias, **options)

    actual = vmap(grad(of_one, argnums=(0, 1, 2)), in_dims=(None, None, 0))(weight, bias, input)
    for sample, *found in zip(input, *actual, strict=True):
        of_sample, *of_parameters = expected_gradients(sample[None], weight, bias, **options)
        assert_close(tuple(found), (*of_parameters, of_sample[0]))


@options
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (2, None, 1), (None, 0, None), (1, 3, 0), (None, None, 0)], ids=str
)
def test_vmap_over_any_argument(in_dims, options):
    shared = tensors(options.get("groups", 1))
    members = [shared, tensors(options.get("groups", 1))]
    stacked = [
        shared[index] if dim is None else torch.stack([member[index] for member in members], dim)
        for index, dim in enumerate(in_dims)
    ]
    actual = vmap(lambda *each: adder_conv2d(*each, **options), in_dims=in_dims)(*stacked)
    for found, member in zip(actual, members, strict=True):
        arguments = [shared[index] if dim is None else member[index] for index, dim in enumerate(in_dims)]
        assert_close(found, adder_conv2d_reference(*arguments, **options))


def test_vmap_of_an_ensemble_with_gradients():
    input, *_ = tensors()
    members = [tensors()[1:] for _ in range(3)]
    weights, biases = (torch.stack(each) for each in zip(*members, strict=True))
    actual = vmap(grad(lambda *leaves: loss(adder_conv2d, *leaves), argnums=(0, 1, 2)), in_dims=(None, 0, 0))(
        input, weights, biases
    )
    for weight, bias, *found in zip(weights, biases, *actual, strict=True):
        assert_close(tuple(found), expected_gradients(input, weight, bias))


def test_nested_vmap():
    input, weight = double(2, 3, 1, 4, 5, 5), double(2, 6, 4, 3, 3)
    actual = vmap(vmap(adder_conv2d, in_dims=(0, None)))(input, weight)
    for first in range(2):
        for second in range(3):
            assert_close(actual[first, second], adder_conv2d_reference(input[first, second], weight[first]))


def test_vmap_of_an_empty_batch():
    assert vmap(adder_conv2d, in_dims=(0, None))(double(2, 0, 4, 5, 5), double(6, 4, 3, 3)).shape == (2, 0, 6, 3, 3)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_jacobian_in_reverse_mode(chunk_size):
    input, weight, bias = double(1, 2, 4, 4), double(3, 2, 3, 3), double(3)
    for index in range(3):
        actual = jacrev(adder_conv2d, argnums=index, chunk_size=chunk_size)(input, weight, bias)
        leaves = [input, weight, bias]

        def of_leaf(leaf, leaves=leaves, index=index):
            return adder_conv2d_reference(*leaves[:index], leaf, *leaves[index + 1 :])

        assert_close(actual, torch.autograd.functional.jacobian(of_leaf, leaves[index]))


def test_vjp():
    leaves = tensors()
    output, pull = vjp(adder_conv2d, *leaves)
    slopes = torch.randn_like(output)
    wanted = [leaf.clone().requires_grad_() for leaf in leaves]
    assert_close(pull(slopes), torch.autograd.grad(adder_conv2d_reference(*wanted), wanted, slopes))


def test_functional_call_of_a_network():
    model = nn.Sequential(AdderConv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), AdderConv2d(4, 3, 1)).double().eval()
    input, parameters = double(5, 2, 5, 5), dict(model.named_parameters())

    def of_one(parameters, sample):
        return functional_call(model, parameters, sample[None]).square().sum()

    actual = vmap(grad(of_one), in_dims=(None, 0))(parameters, input)
    for number, sample in enumerate(input):
        expected = torch.autograd.grad(model(sample[None]).square().sum(), list(parameters.values()))
        assert_close([actual[name][number] for name in parameters], list(expected))


# Forward mode: a tangent of zero without a word would be wrong


@pytest.mark.parametrize("index", [0, 1, 2], ids=["input", "weight", "bias"])
def test_forward_mode_is_refused(index):
    leaves = list(tensors())

    def of_leaf(leaf):
        return adder_conv2d(*leaves[:index], leaf, *leaves[index + 1 :])

    for transform in (lambda: jvp(of_leaf, (leaves[index],), (leaves[index],)), lambda: jacfwd(of_leaf)(leaves[index])):
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* use reverse mode"):
            transform()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_tensors_are_refused(requires_grad):
    input, weight, _ = tensors()
    with forward_ad.dual_level():
        adder_conv2d(input, weight)  # without a tangent
        dual = forward_ad.make_dual(input.requires_grad_(requires_grad), torch.ones_like(input))
        with pytest.raises(NotImplementedError, match=r"forward-mode|forward mode"):
            adder_conv2d(dual, weight)
        with pytest.raises(NotImplementedError, match=r"forward-mode|forward mode"):
            torch.ops.adderkit.adder_conv2d(dual, weight, None, [1, 1], [0, 0], [1, 1], 1)
        grad = torch.ones(3, 6, 4, 5, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match=r"forward-mode|forward mode"):
            torch.ops.adderkit.adder_conv2d_input_grad(grad, dual, weight, [1, 1], [0, 0], [1, 1], 1)


# Second derivatives


def test_second_derivative_through_the_input_is_refused():
    input, weight, bias = (tensor.requires_grad_() for tensor in tensors())
    (penalty,) = torch.autograd.grad(loss(adder_conv2d, input, weight, bias), input, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative .* detach"):
        penalty.square().sum().backward()
    with pytest.raises(NotImplementedError, match=r"no second derivative .* detach"):
        grad(lambda input: grad(lambda leaf: loss(adder_conv2d, leaf, weight, bias))(input).square().sum())(input)


def test_hessian_needs_forward_mode_and_is_refused():
    input, weight, _ = tensors()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        hessian(lambda weight: adder_conv2d(input, weight).square().sum())(weight)


def test_second_derivative_through_the_weight_is_that_of_its_gradient():
    """The weight's gradient, ``Σ g·(x - w)``, is an ordinary function, and so is its derivative ``-Σ g``."""
    input, weight, _ = tensors()
    slopes = double(3, 6, 4, 5)

    def gradient(weight):
        return grad(lambda leaf: (adder_conv2d(input, leaf) * slopes).sum())(weight).sum()

    expected = -slopes.sum((0, 2, 3))[:, None, None, None].expand_as(weight)
    assert_close(grad(gradient)(weight), expected)
