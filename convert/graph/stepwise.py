"""Run a model in steps: a forward pass that stops before a layer, and continues from there after the layer has changed.

For models that ``torch.fx`` can trace, with the modules called as units; the values between them can then be kept.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fx_uses import UnitTracer
from .layers import WEIGHT_LAYERS, meta_copy
from .modes import move_like
from .observe import is_unit, returned_tensors

_logger = logging.getLogger(__name__)
# Values between the nodes that have run and those that have not.
Values = dict[fx.Node, Any]


class SteppedGraph:
    """A model's graph, whose nodes run in any number of steps.

    Args:
        model: The model; its modules are called, not copied.
        graph: Its graph, as ``UnitTracer`` traces it.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._interpreter = fx.Interpreter(fx.GraphModule(model, graph))
        self._nodes = list(graph.nodes)
        modules = dict(model.named_modules(remove_duplicate=False))
        names = {module: name for name, module in model.named_modules()}
        self.first_calls: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            if node.op == "call_module":
                self.first_calls.setdefault(names[modules[str(node.target)]], index)

    def run(self, values: Values, images: Tensor, start: int, stop: int | None = None) -> Any:
        """Run the nodes from ``start`` up to ``stop``, and return the value of the last.

        Args:
            values: Values that the nodes from ``start`` on read; in place, those that the nodes from ``stop`` on read.
            images: ``[N, C, H, W]``, read by the first node.
            start: Index of the first node.
            stop: Index after the last node; by default, all are run.
        """
        run, result = self._interpreter, None
        run.env, run.args_iter = values, iter([images])
        for node in self._nodes[start:stop]:
            result = values[node] = run.run_node(node)
            for unused in run.user_to_last_uses.get(node, ()):
                del values[unused]
        return result

    def input_of(self, index: int, values: Values) -> Tensor:
        """Return the first argument of the node that is next."""
        node = self._nodes[index]
        argument = next(iter((*node.args, *node.kwargs.values())))
        result: Tensor = values[argument]
        return result

    def output_of(self, index: int, values: Values) -> Tensor:
        """Return the value of the node that has just run."""
        result: Tensor = values[self._nodes[index]]
        return result


@torch.no_grad()
def stepped_graph(model: nn.Module, changes: Mapping[str, Sequence[str]], images: Tensor) -> SteppedGraph | None:
    """Trace a model whose layers are changed one after another, each when a pass has reached it.

    Args:
        model: The model, in evaluation mode.
        changes: Layers in order of execution, and the modules that change with each.
        images: A few images ``[N, C, H, W]``, for which graph and model are compared.

    Returns:
        The graph; ``None`` if the model cannot be traced, the graph computes something else, or a change would affect
        what has already been computed.
    """
    if any(_has_hooks(module) and not is_unit(module, WEIGHT_LAYERS) for module in model.modules()):
        return None  # the graph calls units only
    try:
        graph = SteppedGraph(model, UnitTracer(WEIGHT_LAYERS).trace(meta_copy(model)))
        batch = move_like(images, model)
        expected, actual = (returned_tensors(returned) for returned in (model(batch), graph.run({}, batch, 0)))
    except Exception:
        # Control flow on values, starred arguments, foreign code: whatever prevents tracing.
        _logger.debug("%s does not run step by step", type(model).__name__, exc_info=True)
        return None
    same = len(expected) == len(actual) and all(map(_close, expected, actual))
    return graph if same and _in_order(graph.first_calls, changes) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, equal_nan=True)


def _in_order(first_calls: Mapping[str, int], changes: Mapping[str, Sequence[str]]) -> bool:
    """Return whether each layer is called after the one before it, and before the modules that change with it."""
    if not set(changes) <= set(first_calls):
        return False
    calls = [first_calls[path] for path in changes]
    return calls == sorted(calls) and all(
        first_calls.get(changed, call) >= call
        for call, paths in zip(calls, changes.values(), strict=True)
        for changed in paths
    )
