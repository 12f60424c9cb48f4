"""The reference against python loops, ``torch.cdist`` and the published formulas."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from adderkit.adder_layers.reference import adder_conv2d_reference


def both(value):
    return (value, value) if isinstance(value, int) else value


def output_shape(input, weight, options):
    return F.conv2d(input.to("meta"), weight.to("meta"), **options).shape


def terms(input, weight, options):
    """Every ``(output index, input index or None on padding, weight index)`` of the sums, found by loops."""
    stride, padding, dilation = (
        both(options.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    filters, channels, height, width = weight.shape
    for output_index in itertools.product(*map(range, output_shape(input, weight, options))):
        image, out, row, column = output_index
        first_channel = out // (filters // options.get("groups", 1)) * channels
        for channel, i, j in itertools.product(range(channels), range(height), range(width)):
            y = row * stride[0] - padding[0] + i * dilation[0]
            x = column * stride[1] - padding[1] + j * dilation[1]
            inside = 0 <= y < input.shape[2] and 0 <= x < input.shape[3]
            input_index = (image, first_channel + channel, y, x) if inside else None
            yield output_index, input_index, (out, channel, i, j)


def unfolded(input, weight, options):
    """``[N, G, K, L]`` columns and ``[G, O / G, K]`` filters, for each term of the weight and with its factor."""
    groups = options.get("groups", 1)
    others = {name: value for name, value in options.items() if name != "groups"}
    columns = F.unfold(input, weight.shape[-2:], **others)
    terms = [weight] if weight.ndim == 4 else weight.unbind(2)
    taps = terms[0][0].numel()
    columns = columns.reshape(len(input), groups, taps, -1)
    return [(2.0**-index, columns, term.reshape(groups, -1, taps)) for index, term in enumerate(terms)]


TINY = {
    "1x1": ((2, 2, 2, 3), (3, 2, 1, 1), {}),
    "stride-padding": ((1, 2, 4, 3), (2, 2, 3, 2), {"stride": (2, 1), "padding": (1, 2)}),
    "groups": ((1, 4, 3, 3), (2, 2, 2, 2), {"groups": 2}),
    "depthwise-multiplier": ((1, 2, 3, 3), (4, 1, 2, 2), {"groups": 2, "padding": 1}),
    "dilation": ((1, 1, 5, 4), (2, 1, 2, 2), {"dilation": (3, 2)}),
    "padding-above-kernel": ((1, 1, 2, 2), (1, 1, 2, 1), {"padding": 3, "stride": 2}),
}
tiny = pytest.mark.parametrize(("input_shape", "weight_shape", "options"), TINY.values(), ids=TINY.keys())


@tiny
def test_values_equal_loops(input_shape, weight_shape, options):
    input, weight = torch.randn(input_shape).double(), torch.randn(weight_shape).double()
    bias = torch.randn(weight_shape[0]).double()
    expected = bias[:, None, None].expand(output_shape(input, weight, options)).clone()
    for output_index, input_index, weight_index in terms(input, weight, options):
        x = 0.0 if input_index is None else input[input_index]
        expected[output_index] -= abs(x - weight[weight_index])

    torch.testing.assert_close(adder_conv2d_reference(input, weight, bias, **options), expected)


@tiny
def test_gradients_equal_loops_over_the_published_formulas(input_shape, weight_shape, options):
    input, weight = torch.randn(input_shape).double() * 2, torch.randn(weight_shape).double()
    bias = torch.zeros(weight_shape[0]).double()
    grad = torch.randn(output_shape(input, weight, options)).double()
    input_grad, weight_grad = torch.zeros_like(input), torch.zeros_like(weight)
    for output_index, input_index, weight_index in terms(input, weight, options):
        w, g = weight[weight_index], grad[output_index]
        x = 0.0 if input_index is None else input[input_index]
        weight_grad[weight_index] += g * (x - w)
        if input_index is not None:
            input_grad[input_index] += g * min(max(w - x, -1.0), 1.0)

    leaves = [tensor.requires_grad_() for tensor in (input, weight, bias)]
    actual = torch.autograd.grad(adder_conv2d_reference(*leaves, **options), leaves, grad)
    torch.testing.assert_close(actual, (input_grad, weight_grad, grad.sum((0, 2, 3))))


def test_values_equal_cdist_of_unfolded_input(case, operands):
    input, weight, _ = operands(case)
    distance = sum(
        factor * torch.cdist(filters.expand(len(input), -1, -1, -1), columns.mT.contiguous(), p=1)
        for factor, columns, filters in unfolded(input, weight, case.options)
    )

    actual = adder_conv2d_reference(input, weight, **case.options)
    torch.testing.assert_close(actual, -distance.reshape(actual.shape))


def test_gradients_equal_einsum_over_the_published_formulas(case, operands):
    input, weight, _ = operands(case)
    terms = unfolded(input, weight, case.options)
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    output = adder_conv2d_reference(input, weight, **case.options)
    grad = torch.randn_like(output)
    input_grad, weight_grad = torch.autograd.grad(output, leaves, grad)

    split = grad.reshape(len(input), *terms[0][2].shape[:2], -1)
    columns_grad = torch.zeros_like(terms[0][1])
    for index, (factor, columns, filters) in enumerate(terms):
        gap = columns[:, :, None] - filters[None, ..., None]  # [N, G, O / G, K, L]
        actual = weight_grad if weight.ndim == 4 else weight_grad[:, :, index]
        expected = factor * torch.einsum("ngol,ngokl->gok", split, gap)
        torch.testing.assert_close(actual, expected.reshape(actual.shape))
        columns_grad += factor * torch.einsum("ngol,ngokl->ngkl", split, F.hardtanh(-gap))
    others = {name: value for name, value in case.options.items() if name != "groups"}
    expected = F.fold(columns_grad.flatten(1, 2), input.shape[2:], weight.shape[-2:], **others)
    torch.testing.assert_close(input_grad, expected)
