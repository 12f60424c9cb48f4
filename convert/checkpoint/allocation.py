"""Limit on the memory that somebody else's configuration may ask for: no more than its weights can fill."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CheckpointError

_GROWTH = 16  # a network may have been this many times as large before pruning
_SLACK = 1 << 26  # elements of buffers that are computed rather than saved: 256 MB in fp32
_LEAST = 1 << 12  # elements that a tensor counts for at least, since the module around it takes memory too


def count_elements(weights: Mapping[str, Tensor]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(tensor.numel() for tensor in weights.values())


class AllocationLimit(TorchDispatchMode):
    """Context in which new tensors may only have as many elements in all as a file of weights allows.

    Args:
        elements: Number of elements in the weights.
        source: Name of the file or folder in messages.
    """

    def __init__(self, elements: int, source: str) -> None:
        super().__init__()
        self.left = _GROWTH * elements + _SLACK
        self.elements, self.source = elements, source

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; if it creates a tensor from nothing, find out the size first, on the meta device."""
        kwargs = kwargs or {}
        if "device" in kwargs and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            shape = func(*args, **{**kwargs, "device": torch.device("meta")})
            self.left -= max(shape.numel(), _LEAST)
            if self.left < 0:
                raise CheckpointError(
                    f"{self.source} describes a model with a tensor of shape {tuple(shape.shape)}, far more than its "
                    f"weights of {self.elements:,} elements in all: weights and configuration do not belong together"
                )
        return func(*args, **kwargs)
