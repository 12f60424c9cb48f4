"""Adder layers whose weights have several terms."""

import pytest
import torch
from torch import nn

from adderkit import AdderConv2d
from adderkit.adder_layers.conv import adder_conv2d

SETTINGS = {"stride": 2, "padding": 1, "groups": 2}


@pytest.mark.parametrize("terms", [2, 3])
def test_the_terms_are_layers_combined_by_shifts(terms):
    layer = AdderConv2d(4, 6, 3, **SETTINGS, terms=terms)
    assert layer.weight.shape == (6, 2, terms, 3, 3)
    input = torch.randn(2, 4, 7, 5)
    expected = layer.bias[:, None, None] + sum(
        adder_conv2d(input, layer.weight[:, :, index], None, **SETTINGS) / 2**index for index in range(terms)
    )
    torch.testing.assert_close(layer(input), expected)


def test_a_weight_outside_the_range_of_the_input_is_exactly_a_line():
    """With inputs from 0 to 1, slopes of ±1 ± 1/2: two terms hold every two-bit weight."""
    layer = AdderConv2d(1, 4, 1, bias=False, terms=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 2.0], [2.0, -1.0], [-1.0, 2.0], [-1.0, -1.0]])[:, None, :, None, None])
    values = torch.rand(1, 1, 5, 5)
    output = layer(values).detach()
    slopes = torch.tensor([1.5, 0.5, -0.5, -1.5])[:, None, None]
    offsets = output - slopes * values
    torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets))


def test_one_term_is_the_plain_layer():
    torch.manual_seed(0)
    plain = AdderConv2d(4, 6, 3, **SETTINGS)
    torch.manual_seed(0)
    single = AdderConv2d(4, 6, 3, **SETTINGS, terms=1)
    assert single.terms == 1
    assert single.weight.shape == (6, 2, 3, 3)
    input = torch.randn(2, 4, 7, 5)
    assert torch.equal(single(input), plain(input))
    assert repr(single) == repr(plain)


def test_sharp_gradient_leaves_the_output():
    layer = AdderConv2d(3, 4, 3, terms=2)
    input = torch.randn(2, 3, 6, 6)
    expected = layer(input)
    layer.sharpness = 1024.0
    assert torch.equal(layer(input), expected)


def test_state_dict_round_trip():
    layer, other = (AdderConv2d(3, 4, 3, terms=2) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        AdderConv2d(3, 4, 3).load_state_dict(layer.state_dict())


def test_terms_can_be_changed():
    layer = AdderConv2d(3, 4, 3)
    first = layer.weight.detach().clone()
    layer.set_terms_(3)
    assert layer.terms == 3
    assert "terms=3" in repr(layer)
    assert all(torch.equal(layer.weight[:, :, index], first) for index in range(3))
    assert isinstance(layer.weight, nn.Parameter)
    layer.set_terms_(1)
    assert torch.equal(layer.weight, first)
    assert "terms" not in repr(layer)


@pytest.mark.parametrize("terms", [0, -1, 2.0, "2", True])
def test_wrong_number_of_terms(terms):
    with pytest.raises(ValueError, match=r"terms is .*, expected a whole number of at least 1"):
        AdderConv2d(3, 4, 3).set_terms_(terms)


def test_rank_of_the_weight_is_checked():
    with pytest.raises(ValueError, match=r"\[O, C / groups, T, kh, kw\] for T terms"):
        adder_conv2d(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 1, 2, 3, 3))
