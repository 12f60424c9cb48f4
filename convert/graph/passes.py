"""Bring the passes of all batches to one layer after another, each continued from the layer before.

Layers are fitted in order, each on the inputs that it really receives. With a pass from the images for each of them,
time would be quadratic in the depth. Between layers, a pass keeps only the tensors that the rest of the model reads;
those that exceed a given memory are moved to files.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .modes import device_of, move_like
from .stepwise import SteppedGraph, Values

_logger = logging.getLogger(__name__)


class SteppedPasses:
    """Forward passes of several batches that reach the layers of a model together.

    Args:
        model: The model, in evaluation mode.
        graph: Its graph.
        batches: Images ``[n, C, H, W]``.
        memory: Bytes of tensors that may be kept between layers; the others are moved to files.
        folder: Where these files are created, without names; by default, the system's folder of temporary files.
    """

    def __init__(
        self, model: nn.Module, graph: SteppedGraph, batches: Sequence[Tensor], memory: int, folder: Path | None = None
    ) -> None:
        self.model, self.graph, self.memory, self.folder = model, graph, memory, folder
        self._passes = [_Pass(batch) for batch in batches]
        self._warned = False

    def inputs(self, path: str) -> Iterator[Tensor]:
        """Continue each pass up to a layer, and yield the layer's input ``[n, C, H, W]``, one batch after another.

        Args:
            path: Path of the layer; not before that of the previous call.
        """
        call = self.graph.first_calls[path]
        for values in self._continued(call):
            yield self.graph.input_of(call, values)

    def outputs(self, path: str) -> Iterator[Tensor]:
        """Continue each pass through a layer, and yield the layer's output ``[n, O, H', W']``, like ``inputs``."""
        call = self.graph.first_calls[path]
        for values in self._continued(call + 1):
            yield self.graph.output_of(call, values)

    @torch.no_grad()
    def _continued(self, stop: int) -> Iterator[Values]:
        device = device_of(self.model)
        for each in self._passes:
            if device.type != "cpu":
                each.move({key: _on_device(storage, device) for key, storage in each.in_files.items()})
            self.graph.run(each.values, move_like(each.images, self.model), each.reached, stop)
            each.reached = stop
            yield each.values
            self._keep(each)

    def _keep(self, each: "_Pass") -> None:
        """Move the tensors of a pass to files if they do not fit into memory; without space there, discard them."""
        tensors = (*self.model.parameters(), *self.model.buffers(), each.images)
        permanent = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        storages = _storages(each.values)
        each.in_files = {key: storage for key, storage in each.in_files.items() if key in storages}
        own = {key: storage for key, storage in storages.items() if key not in permanent | each.in_files.keys()}
        each.size = sum(storage.nbytes() for storage in own.values())
        if sum(other.size for other in self._passes) <= self.memory:
            return
        try:
            files = {key: _in_file(storage, self.folder) for key, storage in own.items()}
        except OSError as error:
            if not self._warned:
                folder = self.folder or tempfile.gettempdir()
                reason = error.strerror or error
                _logger.warning("no space for activations in %s (%s): they are computed for each layer", folder, reason)
            self._warned = True
            each.discard()
        else:
            each.move(files)
            each.in_files |= {storage.data_ptr(): storage for storage in files.values()}
            each.size = 0


class _Pass:
    """Forward pass of one batch ``[n, C, H, W]`` that has stopped before a node of the graph.

    Args:
        images: The batch.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.discard()

    def discard(self) -> None:
        """Start again from the images."""
        self.values: Values = {}
        self.reached = 0
        self.size = 0  # bytes in memory, apart from the model's and the images'
        self.in_files: dict[int, UntypedStorage] = {}  # by address

    def move(self, storages: Mapping[int, UntypedStorage]) -> None:
        """Replace storages, given by address; tensors that share one still do."""

        def moved(tensor: Tensor) -> Tensor:
            storage = storages.get(tensor.untyped_storage().data_ptr())
            if storage is None:
                return tensor
            empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

        for node, value in self.values.items():
            self.values[node] = tree_map_only(Tensor, moved, value)


def has_storages(device: torch.device) -> bool:
    """Return whether tensors on a device have storages with an address, which XLA's do not."""
    try:
        return torch.empty(1, device=device).untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def _storages(values: Values) -> dict[int, UntypedStorage]:
    """Return the distinct storages of all tensors, also nested ones, by address."""
    tensors = (leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _on_device(storage: UntypedStorage, device: torch.device) -> UntypedStorage:
    return _bytes_of(storage).to(device).untyped_storage()


def _in_file(storage: UntypedStorage, folder: Path | None) -> UntypedStorage:
    """Copy a storage to a mapped file without a name, whose space is freed with the storage."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-") as file:
        file.write(_bytes_of(storage).cpu().numpy().data)
        file.flush()
        return torch.from_file(file.name, shared=True, size=storage.nbytes(), dtype=torch.uint8).untyped_storage()
