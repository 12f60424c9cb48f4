"""Terms that a layer loses with its input channels, beside brute force; and what their means are folded into."""

import pytest
import torch
from torch import nn

from adderkit import AdderConv2d
from adderkit.adder_layers.modules import NormalizedAdderConv2d
from adderkit.convert.graph.layers import trace_layers
from adderkit.convert.pruning.removed_terms import _terms, fold_means_, removed_terms
from adderkit.convert.pruning.surgery import Kept, narrow_


def normalized(*arguments, **kwargs):
    layer = AdderConv2d(*arguments, **kwargs)
    layer.__class__ = NormalizedAdderConv2d
    layer.insert_normalization_()
    return layer


LAYERS = {
    "convolution": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "adder": lambda: AdderConv2d(4, 6, 3, bias=False),
    "adder-bias": lambda: AdderConv2d(4, 6, 3),
    "adder-terms": lambda: AdderConv2d(4, 6, 3, bias=False, groups=2, terms=3),
    "adder-grouped": lambda: AdderConv2d(4, 6, 3, groups=2, bias=False),
    "convolution-grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "adder-normalized": lambda: normalized(4, 6, 3, bias=False),
}


class Net(nn.Module):
    def __init__(self, layer, norm=True):
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.layer(x))


def by_definition(layer, windows):
    """``[S, O, C / G]`` terms from windows ``[G, S, C / G · K]``, element by element."""
    groups, count, _ = windows.shape
    outputs, inputs = layer.weight.shape[:2]
    terms = torch.zeros(count, outputs, inputs)
    for output in range(outputs):
        block = windows[output // (outputs // groups)].view(count, inputs, -1)
        for channel in range(inputs):
            x, weight = block[:, channel], layer.weight[output, channel]
            if not isinstance(layer, AdderConv2d):
                terms[:, output, channel] = (x * weight.flatten()).sum(1)
                continue
            for index, w in enumerate(weight if layer.terms > 1 else [weight]):
                terms[:, output, channel] -= (x - w.flatten()).abs().sum(1) / 2**index
    return terms


@pytest.mark.parametrize("kind", ["convolution", "adder", "adder-grouped", "adder-terms", "convolution-grouped"])
def test_terms_are_those_of_the_definition(kind):
    layer = LAYERS[kind]().requires_grad_(False)
    windows = torch.randn(layer.groups, 50, 4 // layer.groups * 9)
    wanted, found = by_definition(layer, windows), _terms(layer, windows)
    torch.testing.assert_close(found.mean, wanted.mean(0))
    torch.testing.assert_close(found.variance, wanted.var(0, unbiased=False), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.output_variance, wanted.sum(2).var(0, unbiased=False), rtol=1e-4, atol=1e-5)


def test_terms_of_a_linear_layer():
    net = nn.Sequential(nn.Linear(3, 2))
    batch = torch.randn(40, 3)
    layers = trace_layers(net, batch[:1])
    ((path, found),) = removed_terms(net, layers, [batch], torch.Generator())
    assert path == "0"
    assert found.mean.shape == (2, 3)
    assert found.share.shape == (2, 3)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("norm", [True, False])
def test_a_constant_channel_goes_without_a_trace(kind, norm):
    """Its term has no variance, and the fold takes up its mean: the output stays what it was."""
    net = Net(LAYERS[kind](), norm).eval()
    if norm:
        nn.init.normal_(net.norm.running_mean)
        nn.init.uniform_(net.norm.weight, 0.5, 2)
    images = torch.randn(8, 4, 6, 6)
    images[:, 1], images[:, 3] = 0.7, -3.0
    before, gone = net(images), torch.tensor([1, 3])
    layers = trace_layers(net, images[:1])
    terms = dict(removed_terms(net, layers, [images], torch.Generator()))
    assert terms["layer"].share.view(6, -1).min(1).values.max() < 1e-8
    left = fold_means_(net, layers, terms, {"layer": gone})
    narrow_(net, {"layer": Kept(inputs=torch.tensor([0, 2]))})
    after = net(images[:, [0, 2]])
    if not norm and kind in ("convolution", "adder", "adder-terms", "adder-grouped"):
        assert left == ["layer"]
        assert not torch.allclose(after, before, atol=1e-3)
    else:
        assert left == []
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_goes_without_a_trace_through_padding():
    net = Net(AdderConv2d(4, 6, 3, padding=1, bias=False)).eval()
    images = torch.randn(8, 4, 6, 6)
    images[:, 2] = 0
    before, layers = net(images), trace_layers(net, images[:1])
    terms = dict(removed_terms(net, layers, [images], torch.Generator()))
    fold_means_(net, layers, terms, {"layer": torch.tensor([2])})
    narrow_(net, {"layer": Kept(inputs=torch.tensor([0, 1, 3]))})
    torch.testing.assert_close(net(images[:, [0, 1, 3]]), before, rtol=1e-4, atol=1e-4)


def test_many_layers_come_in_several_passes(monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)).eval()
    images = torch.randn(6, 3, 4, 4)
    layers = trace_layers(net, images[:1])
    together = dict(removed_terms(net, layers, [images], torch.Generator().manual_seed(0)))
    monkeypatch.setattr("adderkit.convert.pruning.removed_terms.MEMORY", 1)
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    apart = dict(removed_terms(net, layers, [images], torch.Generator().manual_seed(0)))
    assert len(passes) == 2
    torch.testing.assert_close(apart["0"].mean, together["0"].mean)
