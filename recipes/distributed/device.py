"""The device that a verb computes on: a GPU where there is one, or the one named with ``--device``."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch

from ...convert.errors import AdderkitError
from .connect import connect

_OPTION = "--device"
_CPU = "ACCELERATE_USE_CPU"


@contextmanager
def compute_device(name: str | None) -> Iterator[torch.device]:
    """Select the device that is computed on, also by accelerate, inside the context.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` or any other device of PyTorch; by default the one that accelerate chooses,
            which is the GPU where there is one. In a run of several processes, each has a GPU of its own.

    Yields:
        The device.

    Raises:
        AdderkitError: This machine does not have the device, or several processes would share it.
    """
    if name is None:
        yield connect().device
        return
    device = _device(name)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device.index is not None:
        raise AdderkitError(f"{_OPTION} is {name}, expected {device.type} or cpu: several processes need a GPU each")
    if device.type == "cpu":
        variables = {_CPU: "true"}
    else:
        variables = {_CPU: "false"} if several else {_CPU: "false", "ACCELERATE_TORCH_DEVICE": name}
    current = nullcontext() if device.index is None else torch.accelerator.device_index(device.index)
    with _environment(variables), current:  # kernels run on the current device
        yield device


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the context; accelerate reads its device from them alone."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise AdderkitError(f"{_OPTION} is {name!r}, expected cpu, cuda, cuda:N or another device of PyTorch") from None
    if device.type == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None else 0
    if found is None or device.type != found.type:
        there = f"this machine has {'cpu' if found is None else f'cpu and {found.type}'}"
        raise AdderkitError(f"{_OPTION} {name} is not available; {there}")
    if device.index is not None and device.index >= count:
        raise AdderkitError(f"{_OPTION} {name} is not available; this machine has {count} of that kind")
    return device
