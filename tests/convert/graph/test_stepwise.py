"""Which models run step by step, and which are refused because the result would differ."""

import pytest
import torch
from torch import nn

from adderkit.convert.graph.stepwise import stepped_graph


class Net(nn.Module):
    """Two layers that share a normalization; the input's mean decides on the way through the network, if asked."""

    def __init__(self, shared=False, decides=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm1 = nn.BatchNorm2d(3)
        self.norm2 = self.norm1 if shared else nn.BatchNorm2d(3)
        self.decides = decides

    def forward(self, x):
        if self.decides and x.mean() > 0:
            x = -x
        return self.norm2(self.second(self.norm1(self.first(x)).relu()))


CHANGES = {"first": ("norm1",), "second": ("norm2",)}


def graph_of(model, changes=None):
    return stepped_graph(model.eval(), changes or CHANGES, torch.randn(2, 3, 4, 4))


@torch.no_grad()
def test_steps_compute_what_the_model_does():
    model, images = Net(), torch.randn(2, 3, 4, 4)
    graph, values = graph_of(model), {}
    first, second = graph.first_calls["first"], graph.first_calls["second"]
    graph.run(values, images, 0, first)
    assert torch.equal(graph.input_of(first, values), images)
    model.first.weight.mul_(2)
    graph.run(values, images, first, second)
    assert torch.equal(graph.input_of(second, values), model.norm1(model.first(images)).relu())
    assert len(values) == 1
    assert torch.equal(graph.run(values, images, second), model(images))


def test_a_model_that_decides_by_values_is_refused():
    assert graph_of(Net(decides=True)) is None


def test_a_change_of_what_has_run_already_is_refused():
    assert graph_of(Net(shared=True), {"first": ("norm1",), "second": ("norm1",)}) is None


@pytest.mark.parametrize("order", [["second", "first"], ["first", "third"]])
def test_layers_that_do_not_run_in_this_order_are_refused(order):
    assert graph_of(Net(), dict.fromkeys(order, ())) is None


def test_hooks_around_several_layers_are_refused_and_those_of_one_layer_run():
    model = nn.Sequential(Net())
    changes = {"0.first": (), "0.second": ()}
    model[0].first.register_forward_hook(lambda module, inputs, output: output + 1)
    assert graph_of(model, changes) is not None
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert graph_of(model, changes) is None
