"""Evaluation mode inside a context, and the mode of every module restored after it."""

import timm
import torch
from torch import nn

from adderkit.convert.graph.layers import meta_copy
from adderkit.convert.graph.modes import eval_mode


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
    model[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_network_with_a_graph_for_each_mode_trains_again():
    """timm's FeatureGraphNet: BatchNorms update their statistics in the graph of training only."""
    model = timm.create_model("test_resnet", features_only=True, feature_cls="fx", out_indices=(0,)).train()
    with eval_mode(model):
        pass
    before = model.get_submodule("graph_module.conv1.1").running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert not torch.equal(model.get_submodule("graph_module.conv1.1").running_mean, before)


def test_copy_keeps_the_hooks_that_give_the_maps_and_no_others():
    model = timm.create_model("test_resnet", features_only=True, feature_cls="hook", out_indices=(0, 1))
    model.body.layer1.register_forward_hook(lambda *_: 1 / 0)
    maps = meta_copy(model)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert [tuple(one.shape) for one in maps] == [(1, 32, 16, 16), (1, 32, 8, 8)]
    assert "meta" not in {device.type for device in model.hooks._feature_outputs}
