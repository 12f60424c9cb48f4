"""Synchronized BatchNorm: its classes for the GPU, and those for the CPU that the tests of several processes use.

The latter are compared with a BatchNorm that is given the joint batch. Here every other process has the same batch: the
sum over two processes is twice this one's. ``test_processes.py`` runs two real ones with batches of their own.
"""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.errors import RecipeError
from adderkit.recipes.configs.recipe import Recipe
from adderkit.recipes.distributed import sync_batchnorm
from adderkit.recipes.distributed.sync_batchnorm import (
    SyncedBatchNorm,
    check_sync_batchnorm,
    each_process_alone,
    synchronize_batchnorm_,
)
from adderkit.recipes.training import assemble as prepare

install = runpy.run_path(str(Path(__file__).with_name("cpu_sync_batchnorm.py")))["install"]
NORMS = {
    "flat": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "line": (lambda: nn.BatchNorm1d(5, eps=0.1), (8, 5, 3)),
    "image": (lambda: nn.BatchNorm2d(5), (4, 5, 3, 2)),
    "volume": (lambda: nn.BatchNorm3d(5, momentum=0.3), (2, 5, 3, 2, 2)),
    "plain-average": (lambda: nn.BatchNorm2d(5, momentum=None), (4, 5, 3, 2)),
    "not-affine": (lambda: nn.BatchNorm2d(5, affine=False), (4, 5, 3, 2)),
    "untracked": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 3, 2)),
    "activation": (lambda: BatchNormAct2d(5), (4, 5, 3, 2)),
}


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The classes that run on the CPU."""
    for name in ("_SYNCED", "_UNSUPPORTED_DEVICES"):
        monkeypatch.setattr(sync_batchnorm, name, getattr(sync_batchnorm, name).copy())
    install()


@pytest.fixture
def two_processes(monkeypatch, on_the_cpu):
    """A sum over this process and one that has the same."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))


def pair(make):
    """A synchronized module, and the one it was, in fp64."""
    torch.manual_seed(0)
    plain = make()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    synced = nn.Sequential(copy.deepcopy(plain))
    synchronize_batchnorm_(synced)
    return synced, plain.double()


def adder_like(shape):
    """Negative and far from zero, as an adder layer's output is."""
    return torch.randn(shape) * 20 - 600


@pytest.mark.parametrize("kind", NORMS)
def test_equals_the_joint_batch(kind, two_processes):
    """Output, gradients and statistics over two steps."""
    make, shape = NORMS[kind]
    synced, plain = pair(make)
    for _ in range(2):
        ours, grad = adder_like(shape).requires_grad_(), torch.randn(shape)
        theirs = torch.cat([ours, ours]).detach().double().requires_grad_()
        output, expected = synced(ours), plain(theirs)
        synced.zero_grad()
        plain.zero_grad()
        output.backward(grad)
        expected.backward(torch.cat([grad, grad]).double())
        half = shape[0]
        torch.testing.assert_close(output.double(), expected[:half], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.grad.double(), theirs.grad[:half], rtol=1e-3, atol=1e-5)
        for mine, whole in zip(synced.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(2 * mine.grad.double(), whole.grad, rtol=1e-3, atol=1e-3)
    for mine, whole in zip(synced.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine.double(), whole.double(), rtol=1e-4, atol=1e-4)


def test_half_precision_is_normalized_in_single(two_processes):
    synced, _ = pair(NORMS["image"][0])
    batch = adder_like((4, 5, 3, 2)).bfloat16()
    assert synced(batch).dtype == torch.bfloat16
    again, _ = pair(NORMS["image"][0])
    torch.testing.assert_close(synced(batch).float(), again(batch.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", NORMS)
def test_the_plain_norm_outside_training(kind, device, request):
    """In evaluation, and where every process measures for itself: nothing is exchanged (no process group is there)."""
    if device == "cpu":
        request.getfixturevalue("on_the_cpu")
    make, shape = NORMS[kind]
    synced, plain = pair(make)
    with each_process_alone(synced):
        batch = adder_like(shape)
        torch.testing.assert_close(synced(batch), plain.float()(batch))
    synced.eval()
    plain.eval()
    torch.testing.assert_close(synced(batch), plain(batch))


def test_the_batch_of_all_processes_in_training(monkeypatch):
    """By torch's class, which then wants a GPU; ``each_process_alone`` keeps it from it."""
    synced, plain = pair(NORMS["activation"][0])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    batch = adder_like((4, 5, 3, 2))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        synced(batch)
    with each_process_alone(synced):
        torch.testing.assert_close(synced(batch), plain.float()(batch))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        synced(batch)


def test_the_batch_of_all_processes_in_training_on_the_cpu(on_the_cpu):
    synced, _ = pair(NORMS["image"][0])
    with pytest.raises(ValueError, match="process group"):
        synced(adder_like((4, 5, 3, 2)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_measured_by_each_process_alone(device, request):
    if device == "cpu":
        request.getfixturevalue("on_the_cpu")
    batches = [adder_like((4, 5, 3, 2)) for _ in range(3)]
    synced, plain = pair(NORMS["activation"][0])
    plain = nn.Sequential(plain.float())
    with each_process_alone(synced):
        assert reestimate_batchnorm_(synced, batches) == reestimate_batchnorm_(plain, batches) == 12
    for mine, expected in zip(synced.buffers(), plain.buffers(), strict=True):
        assert mine.equal(expected)


def test_names_and_tensors_stay():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), BatchNormAct2d(5), nn.Sequential(nn.BatchNorm2d(5)))
    before = model.state_dict(keep_vars=True)
    synchronize_batchnorm_(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


@pytest.mark.parametrize(
    ("processes", "sync_bn", "teacher_lr"), [(2, True, 0.0), (2, True, 0.1), (1, True, 0.1), (2, False, 0.1)]
)
def test_what_trains_is_synchronized(processes, sync_bn, teacher_lr):
    """On several processes: the model, and a teacher that trains too; a frozen one is left as it is."""
    model, objective = (nn.Sequential(nn.BatchNorm2d(3)) for _ in range(2))
    objective.trains_teacher = teacher_lr > 0
    recipe = Recipe(sync_bn=sync_bn, teacher_lr=teacher_lr, distill_loss_weight=1.0)
    prepare.configure_layers(model, objective, recipe, processes)
    synced = processes > 1 and sync_bn
    found = [isinstance(each[0], SyncedBatchNorm) for each in (model, objective)]
    assert found == [synced, synced and teacher_lr > 0]


def test_a_norm_with_a_way_of_its_own_is_refused():
    class Whitening(nn.BatchNorm2d):
        pass

    with pytest.raises(RecipeError, match=r"1 is a Whitening, expected torch's BatchNorm .*--set sync_bn=false"):
        synchronize_batchnorm_(nn.Sequential(nn.ReLU(), Whitening(3)))


@pytest.mark.parametrize(
    ("device", "processes", "sync_bn", "refused"),
    [("cpu", 2, True, True), ("cpu", 2, False, False), ("cpu", 1, True, False), ("cuda", 2, True, False)],
)
def test_several_processes_on_the_cpu_are_refused(device, processes, sync_bn, refused):
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    if refused:
        with pytest.raises(RecipeError, match=r"sync_bn is on with 2 processes on cpu.*--set sync_bn=false"):
            check_sync_batchnorm(Recipe(sync_bn=sync_bn), accelerator)
    else:
        check_sync_batchnorm(Recipe(sync_bn=sync_bn), accelerator)
