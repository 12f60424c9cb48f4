"""A second device on a machine that has none: tensors that say they are elsewhere, and compute on the CPU.

As on a GPU, an operator refuses tensors of two devices, apart from numbers and copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")  # a device that autograd serves from the thread of the CPU
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor on the second device; ``inner`` has its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Provide the device inside the context."""
    with _Mode():
        yield DEVICE


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, Elsewhere) for tensor in tensors]
    if func not in _COPIES and any(there) and any(not each and t.ndim for each, t in zip(there, tensors, strict=True)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    named = kwargs.get("device")
    meta = named is not None and torch.device(named).type == "meta"
    elsewhere = any(there) if named is None else torch.device(named).type == DEVICE.type
    inner = {key: _inner(value) for key, value in kwargs.items()}
    if named is not None and not meta:
        inner["device"] = torch.device("cpu")
    output = func(*tree_map(_inner, args), **inner)
    if not func._schema.is_mutable and elsewhere:
        return tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, output)
    return args[0] if func._schema.is_mutable and func._schema.name.endswith("_") else output
