"""Hooks inside a context: what they are called with, and that none is left."""

import pytest
import torch
from torch import nn

from adderkit.convert.graph.hooks import hooked


class Sum(nn.Module):
    def forward(self, first, second):
        return first + second


def hooks_of(module):
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_called_with_name_inputs_and_output():
    module, calls = Sum(), []
    one, two = torch.ones(1), torch.ones(1)
    with hooked({"sum": module}, pre=lambda *call: calls.append(call), post=lambda *call: calls.append(call)):
        output = module(one, second=two)
    module(one, two)
    assert calls == [("sum", (one, two)), ("sum", (one, two), output)]


@pytest.mark.parametrize("error", [False, True])
def test_none_is_left(error):
    modules = {"a": Sum(), "b": Sum()}

    def fail(name, inputs):
        raise KeyError

    with pytest.raises(KeyError) if error else pytest.MonkeyPatch.context(), hooked(modules, pre=fail):
        assert [hooks_of(module) for module in modules.values()] == [1, 1]
        if error:
            modules["a"](1, 2)
    assert [hooks_of(module) for module in modules.values()] == [0, 0]
