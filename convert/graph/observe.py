"""Observe one forward pass: which modules and functions take the tensor that a weight layer returned.

Hooks see modules; a ``TorchFunctionMode`` sees the functions and operators between modules, so that ``norm(y) + y`` and
``F.relu(y)`` are known as uses of ``y``. This works for any model that runs, whether it can be traced or not.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .hooks import hooked


@dataclasses.dataclass
class Seen:
    """Observations of one weight layer in a forward pass.

    Args:
        input_shape: Shape of the input in the first call.
        output_shape: Shape of the output in the first call.
        calls: Number of calls.
        consumers: Paths of the modules that take the unchanged output, in order.
        functions: Names of the functions that take the unchanged output; ``output`` if the model returns it.
        weight_reader: Name of a function outside of the layer that takes a parameter of it; empty if none does.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int = 0
    consumers: list[str] = dataclasses.field(default_factory=list)
    functions: list[str] = dataclasses.field(default_factory=list)
    weight_reader: str = ""


def is_normalization(module: nn.Module) -> bool:
    """Return whether the module re-centers and rescales its input by statistics that follow the input."""
    batch = nn.modules.batchnorm._NormBase
    return isinstance(module, batch | nn.GroupNorm | nn.LayerNorm)


def normalizes_each_channel(module: nn.Module) -> bool:
    """Return whether a normalization removes the offset and scale of each single channel, as BatchNorm does.

    GroupNorm and LayerNorm remove offset and scale that channels share. Adder outputs have a different offset and scale
    in each channel, which then dominate the statistics of such a normalization.
    """
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == module.num_channels
    return not isinstance(module, nn.LayerNorm)


def is_unit(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Return whether a module is observed as a unit; other modules are containers that only pass tensors on."""
    return not any(module.children()) or is_normalization(module) or isinstance(module, kinds)


def function_name(name: str) -> str:
    """Return the name of a function as in the model's source: ``relu`` for ``relu_``, ``add`` for ``__iadd__``."""
    bare = name.strip("_")
    return bare[1:] if name.startswith("__i") and bare[1:] in {"add", "sub", "mul", "truediv"} else bare


@torch.no_grad()
def observe(model: nn.Module, example_input: Tensor, kinds: tuple[type[nn.Module], ...]) -> dict[str, Seen]:
    """Run a model once and observe its layers.

    Args:
        model: The model, in evaluation mode.
        example_input: ``[N, C, H, W]``.
        kinds: Classes of the layers to report.

    Returns:
        Observations of each layer that ran, by path, in order of first execution.
    """
    watch = _Watch(model, kinds)
    with hooked(watch.modules, pre=watch.before, post=watch.after), watch:
        output = model(example_input)
    for source in watch.sources([output]):
        watch.note(source, "functions", "output")
    for path, seen in watch.seen.items():
        seen.weight_reader = watch.readers.get(path, "")
    return watch.seen


class _Watch(TorchFunctionMode):
    """State of a forward pass; as a mode, it intercepts every torch function."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.kinds = kinds
        self.modules = dict(model.named_modules())
        self.seen: dict[str, Seen] = {}
        # Tensors are kept alive so that their ids stay unique; the version tells whether one was changed in place.
        self.produced: dict[int, tuple[Tensor, int, str]] = {}
        self.owners = {
            id(parameter): path
            for path, module in self.modules.items()
            if isinstance(module, kinds)
            for parameter in module.parameters(recurse=False)
        }
        self.readers: dict[str, str] = {}
        self.depth = 0  # number of units that are running: functions inside a unit are not observed

    def before(self, path: str, inputs: tuple[Any, ...]) -> None:
        if not is_unit(self.modules[path], self.kinds):
            return
        if self.depth == 0 and not isinstance(self.modules[path], nn.Identity):
            for source in self.sources(inputs):
                self.note(source, "consumers", path)
        self.depth += 1

    def after(self, path: str, inputs: tuple[Any, ...], output: Any) -> None:
        if not is_unit(self.modules[path], self.kinds):
            return
        self.depth -= 1
        if isinstance(self.modules[path], self.kinds) and isinstance(output, Tensor):
            seen = self.seen.setdefault(path, Seen(tuple(inputs[0].shape), tuple(output.shape)))
            seen.calls += 1
            self.produced[id(output)] = (output, output._version, path)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        given = {id(tensor): tensor._version for tensor in _tensors((args, kwargs))}
        sources = self.sources((args, kwargs))
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "function")
        made = list(_tensors(result))
        # A function that returns its argument (contiguous, dropout in evaluation mode) passes it on, like an Identity.
        passes = all(given.get(id(tensor)) == tensor._version for tensor in made)
        if name == "__setitem__" or (made and not passes):
            for source in sources:
                self.note(source, "functions", function_name(name))
        for tensor in _tensors((args, kwargs)) if made else ():  # a query of shape or dtype makes none
            if id(tensor) in self.owners:
                self.readers.setdefault(self.owners[id(tensor)], function_name(name))
        return result

    def sources(self, values: Any) -> list[str]:
        """Return the layers whose unchanged outputs are among the values."""
        found = (self.produced.get(id(tensor)) for tensor in _tensors(values))
        return [name for tensor, version, name in filter(None, found) if tensor._version == version]

    def note(self, source: str, kind: str, name: str) -> None:
        takers: list[str] = getattr(self.seen[source], kind)
        if name not in takers:
            takers.append(name)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested lists, tuples and mappings."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def returned_tensors(returned: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a model returned: logits, or maps in any nesting of lists and dicts."""
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
