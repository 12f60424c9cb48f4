"""Prefixes of wrappers come off if all names fit then; anything else stays as it is in the file."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adderkit.convert.errors import CheckpointError
from adderkit.convert.foreign_weights.names import fit_names, without_prefix


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))


class Task(nn.Module):
    """A module of Lightning: the network and its loss."""

    def __init__(self, net, name="model"):
        super().__init__()
        self.add_module(name, net)
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))


class Watched(nn.Module):
    """A module as FSDP wraps it."""

    def __init__(self, inner):
        super().__init__()
        self._fsdp_wrapped_module = inner


def inside_fsdp(net):
    return Watched(nn.Sequential(net[0], Watched(net[1])))


WRAPPERS = {
    "compiled": (torch.compile, "_orig_mod."),
    "parallel": (nn.DataParallel, "module."),
    "compiled, then parallel": (lambda net: nn.DataParallel(torch.compile(net)), "module._orig_mod."),
    "parallel, then compiled": (lambda net: torch.compile(nn.DataParallel(net)), "_orig_mod.module."),
    "compiled inside": (lambda net: nn.Sequential(net[0], torch.compile(net[1])), "_orig_mod."),
    "averaged": (AveragedModel, "module."),
    "lightning": (Task, "model."),
    "lightning, compiled": (lambda net: Task(torch.compile(net), "net"), "net._orig_mod."),
    "lightning, parallel": (lambda net: nn.DataParallel(Task(net, "backbone")), "module.backbone."),
    "fsdp": (inside_fsdp, "_fsdp_wrapped_module._fsdp_wrapped_module."),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_prefix_of_a_wrapper(net, kind):
    wrap, removed = WRAPPERS[kind]
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fit = fit_names("w.pth", wrap(net).state_dict(), expected.keys())
    assert fit.tensors.keys() == expected.keys()
    assert all(torch.equal(fit.tensors[name], expected[name]) for name in expected)
    assert fit.removed == removed
    assert all("criterion" in name or name == "n_averaged" for name in fit.left_out)
    assert len(fit.left_out) == (kind == "averaged" or "lightning" in kind)


def test_names_that_fit_stay(net):
    fit = fit_names("w.pth", net.state_dict(), net.state_dict().keys())
    assert (fit.tensors.keys(), fit.removed, fit.left_out) == (net.state_dict().keys(), "", ())


def test_names_that_never_fit_stay_as_they_are_in_the_file(net):
    weights = {f"module.{name}": tensor for name, tensor in net.state_dict().items() if name != "0.bias"}
    assert fit_names("w.pth", weights, net.state_dict().keys()).tensors.keys() == weights.keys()


def test_batch_counters_may_be_missing(net):
    weights = {f"module.{name}": t for name, t in net.state_dict().items() if "num_batches" not in name}
    fit = fit_names("w.pth", weights, net.state_dict().keys())
    assert fit.tensors.keys() == net.state_dict().keys() - {"1.0.num_batches_tracked"}


def test_another_head_beside_the_network_is_not_dropped(net):
    weights = nn.ModuleDict({"backbone": net, "head": nn.Linear(2, 2)}).state_dict()
    assert "head.weight" in fit_names("w.pth", weights, net.state_dict().keys()).tensors


def test_averaged_weights_beside_those_of_the_last_step(net):
    average = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    weights = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    weights |= {f"ema_model.module.{name}": tensor for name, tensor in average.items()}
    fit = fit_names("w.pth", weights, average.keys())
    assert fit.removed == "ema_model.module."
    assert all(torch.equal(fit.tensors[name], average[name]) for name in average)
    assert set(fit.left_out) == {name for name in weights if name.startswith("model.")}


def test_two_networks_are_refused(net):
    weights = nn.ModuleDict({"student": net, "teacher": net}).state_dict()
    with pytest.raises(CheckpointError, match=r"several networks that fit, 'student\.', 'teacher\.', expected one"):
        fit_names("w.pth", weights, net.state_dict().keys())


def test_counters_of_thop_are_left_out(net):
    weights = net.state_dict() | {"total_ops": torch.zeros(1), "1.0.total_params": torch.zeros(1)}
    fit = fit_names("w.pth", weights, net.state_dict().keys())
    assert set(fit.left_out) == {"total_ops", "1.0.total_params"}
    assert fit.tensors.keys() == net.state_dict().keys()


def test_prefix_without_a_model(net):
    wrapped = torch.compile(nn.DataParallel(nn.ModuleDict({"net": net}))).state_dict()
    assert without_prefix(wrapped).keys() == net.state_dict().keys()
    assert without_prefix(net.state_dict()).keys() == net.state_dict().keys()
