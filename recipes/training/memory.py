"""Estimate the memory that training takes on each process, from shapes alone: nothing is allocated or computed.

Counted are the weights, a gradient and the optimizer's state for each, all in fp32; the moving average and the teacher;
what autograd saves of one batch for the backward pass of the objective, found by its own hooks on tensors without data;
and, on top of these, the largest layer's input and output twice over, for gradients in flight. Not counted are the
framework's, CUDA's and kernels' own memory, often 1 GB, a frozen teacher's activations, which are freed at once, and
what the allocator caches.
"""

import copy
import dataclasses
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..configs.recipe import Recipe
from ..objectives.objective import Objective

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one process needs while it trains.

    Args:
        weights: Parameters and buffers of the model.
        gradients: Gradients of its parameters; twice with several processes, which exchange them through buckets.
        optimizer: State of the optimizer.
        average: The moving average of the weights.
        teacher: Weights of teacher and learned layers of the losses; for those that train, also gradients and the
            optimizer's state.
        activations: Tensors of a batch that autograd saves, also those of a teacher that trains.
        passing: The largest layer's input and output, and their gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    teacher: int
    activations: int
    passing: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-ready mapping, in bytes."""
        return {**dataclasses.asdict(self), "total": self.total}

    def line(self, batch_size: int) -> str:
        """Return the estimate as text, in GB."""
        parts = ", ".join(f"{name} {_gb(value)}" for name, value in dataclasses.asdict(self).items() if value)
        return f"about {_gb(self.total)} GB per process with {batch_size} images: {parts}"


def estimate_memory(
    model: nn.Module, objective: Objective, recipe: Recipe, input_size: tuple[int, int, int], processes: int
) -> Memory:
    """Estimate the memory of one process.

    Args:
        model: The model to train; it is left as it is.
        objective: The losses, with the teacher.
        recipe: Batch size, precision, optimizer, moving average.
        input_size: ``(channels, height, width)`` of an image.
        processes: Number of processes.
    """
    parameters = sum(_bytes(each) for each in model.parameters() if each.requires_grad)
    weights = _module_bytes(model)
    shape, precision, per_weight = (recipe.batch_size, *input_size), _PRECISIONS.get(recipe.amp), _values_kept(recipe)
    kept, largest = _activations(model, objective, shape, precision)
    taught = _module_bytes(objective)
    taught += round(sum(_bytes(each) for each in objective.parameters() if each.requires_grad) * (1 + per_weight))
    return Memory(
        weights=weights,
        gradients=parameters * (2 if processes > 1 else 1),
        optimizer=round(parameters * per_weight),
        average=weights if recipe.model_ema else 0,
        teacher=taught,
        activations=kept,
        passing=2 * largest,
    )


def _values_kept(recipe: Recipe) -> float:
    """Return the number of values that the optimizer keeps per weight, found by one step on a small matrix."""
    weight = nn.Parameter(torch.ones(16, 16))
    weight.grad = torch.ones_like(weight)
    optimizer: Any = create_optimizer_v2([weight], opt=recipe.opt, lr=1e-3, momentum=recipe.momentum)
    optimizer.step()
    state = getattr(optimizer, "_base_optimizer", optimizer).state  # timm's Lookahead has another inside
    kept = [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    return sum(value.numel() for value in kept if value.ndim) / weight.numel()


def _activations(
    model: nn.Module, objective: Objective, shape: tuple[int, ...], precision: torch.dtype | None
) -> tuple[int, int]:
    """Return the bytes that autograd saves of a batch besides the weights, and those of the largest layer's tensors."""
    storages: dict[int, Any] = {}
    largest = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        tensors = [each for each in (*inputs, output) if isinstance(each, Tensor)]
        largest = max(largest, sum(map(_bytes, tensors)))

    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake, aim = copy.deepcopy(model).train(), copy.deepcopy(objective)
    with mode:
        own = {
            each.untyped_storage()._cdata for whole in (fake, aim) for each in (*whole.parameters(), *whole.buffers())
        }
        for module in fake.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(look)
        images, labels = torch.empty(shape), torch.zeros(shape[0], dtype=torch.long)
        with (
            saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None),
        ):
            aim(fake, images, labels)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own), largest


def _module_bytes(module: nn.Module) -> int:
    return sum(map(_bytes, (*module.parameters(), *module.buffers())))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f}" if value >= 5e6 else "<0.01"
