"""Find the uses of layer outputs with ``torch.fx``: all branches of the graph, for models that it can trace."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .observe import function_name, is_unit

_logger = logging.getLogger(__name__)
# Functions, methods and attributes that read the shape or type of a tensor, not its values.
SHAPE_QUERIES = {
    "size",
    "dim",
    "shape",
    "ndim",
    "numel",
    "stride",
    "device",
    "dtype",
    "is_contiguous",
    "_assert",
    "__len__",
}
# Functions and methods that return their argument unchanged, in evaluation mode.
PASS_THROUGH = {"contiguous", "detach", "dropout", "dropout2d", "identity"}
_PASS_THROUGH_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_PASS_THROUGH_NAMES = {"DropPath", "DropBlock2d", "StochasticDepth"}  # of timm and torchvision


def passes_through(module: nn.Module) -> bool:
    """Return whether a module returns its argument unchanged, in evaluation mode."""
    return isinstance(module, _PASS_THROUGH_MODULES) or type(module).__name__ in _PASS_THROUGH_NAMES


def node_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, or of the attribute that it reads."""
    if isinstance(node.target, str):
        return node.target
    if node.target is getattr:
        return str(node.args[1])
    return getattr(node.target, "__name__", "function")


def symbolic_uses(
    model: nn.Module, kinds: tuple[type[nn.Module], ...]
) -> dict[str, tuple[list[str], list[str]]] | None:
    """Trace a model and list the modules and functions that take each weight layer's output.

    Args:
        model: The model, in evaluation mode and without the user's hooks, which tracing would call.
        kinds: Classes of the layers to report.

    Returns:
        Modules and functions by path, named as by ``observe``; ``None`` if the model cannot be traced.
    """
    try:
        graph = UnitTracer(kinds).trace(model)
    except Exception:
        # Control flow on values, starred arguments, foreign code: the uses seen in the observed run must suffice.
        _logger.debug("torch.fx cannot trace %s", type(model).__name__, exc_info=True)
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    uses: dict[str, tuple[list[str], list[str]]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and isinstance(module, kinds):
            takers, functions = uses.setdefault(names[module], ([], []))
            for kind, name in _users(node, modules, names):
                found = takers if kind == "module" else functions
                if name not in found:
                    found.append(name)
    return uses


class UnitTracer(fx.Tracer):
    """Tracer that stops at the modules that ``observe`` treats as units.

    Args:
        kinds: Classes of layers that are units, besides modules without children and normalizations.
    """

    def __init__(self, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__(autowrap_functions=())
        self.kinds = kinds

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether the module is a unit."""
        return is_unit(m, self.kinds)

    @torch.no_grad()
    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace as ``torch.fx.Tracer`` does, without gradients."""
        return super().trace(root, concrete_args)


def _users(node: fx.Node, modules: dict[str, nn.Module], names: dict[nn.Module, str]) -> list[tuple[str, str]]:
    """List the users of a node's value, looking through everything that passes it on unchanged."""
    found: list[tuple[str, str]] = []
    for user in node.users:
        if user.op == "call_module":
            module = modules[str(user.target)]
            if not isinstance(module, nn.Identity):
                found.append(("module", names[module]))
            # Dropout is a user, and passes the value on: in evaluation mode its own users receive the same tensor.
            if passes_through(module):
                found += _users(user, modules, names)
            continue
        name = "output" if user.op == "output" else node_name(user)
        if name in PASS_THROUGH:
            found += _users(user, modules, names)
        elif name not in SHAPE_QUERIES:
            found.append(("function", function_name(name)))
    return found
