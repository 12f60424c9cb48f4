"""``--device``: what is chosen, what accelerate is told, and what is refused."""

import os

import pytest
import torch
from accelerate import Accelerator

from adderkit.convert.errors import AdderkitError
from adderkit.recipes.distributed.device import compute_device

VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*VARIABLES, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """Let torch believe in two GPUs."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    current = []

    class Index:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.accelerator, "device_index", Index)
    return current


def told():
    return [os.environ.get(name) for name in VARIABLES]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without a GPU")
def test_without_a_gpu():
    with compute_device(None) as device:
        assert device == torch.device("cpu") == Accelerator().device


def test_cpu(gpus):
    with compute_device("cpu") as device:
        assert device == torch.device("cpu") == Accelerator().device
    assert told() == [None, None]


def test_gpus(gpus):
    with compute_device("cuda:1") as device:
        assert device == torch.device("cuda:1")
        assert told() == ["false", "cuda:1"]
        assert gpus == [1]
    with compute_device("cuda") as device:
        assert (device, told(), gpus) == (torch.device("cuda"), ["false", "cuda"], [])
    assert (told(), gpus) == ([None, None], [])


def test_the_environment_comes_back_after_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "no")
    with pytest.raises(KeyError), compute_device("cpu"):
        raise KeyError
    assert told() == ["no", None]


def test_several_processes(gpus, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with compute_device("cuda") as device:  # which one is accelerate's choice
        assert (device, told()) == (torch.device("cuda"), ["false", None])
    with pytest.raises(AdderkitError, match="--device is cuda:1, expected cuda or cpu"), compute_device("cuda:1"):
        pass


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "CUDA"])
def test_no_device_at_all(name):
    with pytest.raises(AdderkitError, match=f"--device is {name!r}, expected cpu, cuda"), compute_device(name):
        pass


@pytest.mark.parametrize(("name", "message"), [("mps", "has cpu and cuda"), ("cuda:2", "has 2 of that kind")])
def test_a_device_of_other_machines(gpus, name, message):
    with pytest.raises(AdderkitError, match=f"--device {name} is not available; .*{message}"), compute_device(name):
        pass


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "meta"])
def test_a_gpu_that_is_not_there(name):
    with pytest.raises(AdderkitError, match=f"--device {name} is not available; this machine has cpu"):
        compute_device(name).__enter__()
