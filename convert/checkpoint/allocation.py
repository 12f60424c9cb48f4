"""Memory for what a foreign configuration asks for: refused before it is allocated, where weights cannot fill it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import CheckpointError

_GROWTH = 16  # a network before pruning may be that many times what is left of it
_SLACK = 1 << 26  # elements of buffers that are computed rather than saved: 256 MB in fp32
_LEAST = 1 << 12  # what a tensor counts at least, since the module around it is not free either


def count_elements(weights: Mapping[str, Tensor]) -> int:
    """Elements of all tensors together."""
    return sum(tensor.numel() for tensor in weights.values())


class AllocationLimit(TorchDispatchMode):
    """Inside, fresh tensors may have so many elements in all as go with a file of weights.

    Args:
        elements: How many the weights have.
        source: What an error calls their place.
    """

    def __init__(self, elements: int, source: str) -> None:
        super().__init__()
        self.left = _GROWTH * elements + _SLACK
        self.elements, self.source = elements, source

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; one that makes a tensor from nothing is asked for its size first."""
        kwargs = kwargs or {}
        if "device" in kwargs and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            shape = func(*args, **{**kwargs, "device": torch.device("meta")})
            self.left -= max(shape.numel(), _LEAST)
            if self.left < 0:
                raise CheckpointError(
                    f"{self.source} describes a model with a tensor of shape {tuple(shape.shape)}, far more than its "
                    f"weights of {self.elements:,} elements in all: its configuration is not theirs"
                )
        return func(*args, **kwargs)
