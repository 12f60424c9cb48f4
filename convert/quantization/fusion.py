"""Cut a model into fused operations with ``torch.fx``."""

import dataclasses
import math
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.geometry import Window
from ...adder_layers.modules import NormalizedAdderConv2d, same_padding
from ..conversion.converters import converter_of
from ..errors import AdderkitError
from ..graph.fx_uses import PASS_THROUGH, SHAPE_QUERIES, UnitTracer, node_name, passes_through
from ..graph.layers import input_size, meta_copy
from ..graph.observe import function_name
from .fused_ops import FusedGraph, FusedOp, OpKind

_REMEDY = "expected ReLU, ReLU6 or Hardtanh, BatchNorm, sums, max- and average pooling: choose a network of these"


def fuse(model: nn.Module, image: tuple[int, int, int] | None = None) -> FusedGraph:
    """Cut a model into fused operations.

    Args:
        model: A model that ``torch.fx`` can trace.
        image: ``(channels, height, width)``; by default what the model's timm configuration says.

    Raises:
        AdderkitError: The model contains an operation that integer plans cannot express; the message names the module.
    """
    image = image or input_size(model)
    twin = meta_copy(model)
    try:
        graph = UnitTracer((nn.Conv2d, nn.Linear)).trace(twin)
        ShapeProp(fx.GraphModule(twin, graph)).propagate(torch.zeros(1, *image, device="meta"))
    except Exception as error:  # whatever a foreign forward raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise AdderkitError(
            f"{type(model).__name__} cannot be cut into integer layers, torch.fx cannot trace it: {reason:.120}; "
            "choose a network without control flow on values"
        ) from error
    return _FusionPass(twin, image).run(graph)


@dataclasses.dataclass
class _Value:
    """Value of a node: an operation into which more can be fused, or an activation that is written.

    Args:
        op: The operation; ``None`` once its result is written.
        number: Number of the activation; -1 before it is written.
        flat: Whether the node is ``[N, C·H·W]`` of an activation ``[C, H, W]``.
    """

    op: FusedOp | None
    number: int = -1
    flat: bool = False


class _FusionPass:
    """Walks a graph and lets operations grow until something else needs their result."""

    def __init__(self, model: nn.Module, image: tuple[int, int, int]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.shapes = [image]
        self.ops: list[FusedOp] = []
        self.values: dict[fx.Node, _Value] = {}

    def run(self, graph: fx.Graph) -> FusedGraph:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = _Value(None, 0)
            elif node.op == "output":
                self._output(node)
            elif node.op == "call_module":
                self._call_module(node, self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._call_function(node, node_name(node))
        return FusedGraph(tuple(self.shapes), tuple(self.ops))

    def _output(self, node: fx.Node) -> None:
        source = node.args[0]
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if value is None:
            raise AdderkitError("the model returns something other than logits, which integer plans cannot express")
        op = value.op
        is_plain = op is not None and op.kind == "convolution" and not self._is_final(op)
        if op is not None and is_plain and self._shape(source)[1:] == (1, 1):
            value.op = dataclasses.replace(op, kind="linear")
        self._materialize(source)
        if not self.ops or self.ops[-1].output != value.number:
            raise AdderkitError(f"the model returns something other than what its last layer writes; {_REMEDY}")

    def _call_module(self, node: fx.Node, module: nn.Module) -> None:
        path = str(node.target)
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._layer(node, path, module)
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.running_mean is not None:
            self._normalize(node, path)
            for child in (getattr(module, "drop", None), getattr(module, "act", None)):  # timm's BatchNormAct2d
                if isinstance(child, nn.Module) and not passes_through(child):
                    self._clamp(node, node, path, *self._bounds(path, child))
        elif passes_through(module):
            self._forward_through(node)
        elif isinstance(module, nn.MaxPool2d):
            self._max_pool(node, path, module)
        elif isinstance(module, nn.AvgPool2d):
            self._average_pool(node, path, module)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._global_pool(node, path)
        elif isinstance(module, nn.Flatten) and module.start_dim == 1:
            self._flatten(node)
        elif type(module).__name__ == "FastAdaptiveAvgPool":  # timm's
            self._global_pool(node, path)
        else:
            self._clamp(node, node.args[0], path, *self._bounds(path, module))
            if getattr(module, "inplace", False):
                self._alias(node)

    def _call_function(self, node: fx.Node, name: str) -> None:
        path = _path(node) or name
        bare = function_name(name)
        if name in SHAPE_QUERIES or not any(source in self.values for source in node.all_input_nodes):
            return
        if bare in ("add", "iadd"):
            self._add(node, path)
        elif bare in PASS_THROUGH or (bare == "getitem" and _keeps_all(node.args[1])):
            self._forward_through(node)
        elif bare in ("relu", "relu6"):
            self._clamp(node, node.args[0], path, 0.0, 6.0 if bare == "relu6" else math.inf)
        elif bare in ("flatten", "view", "reshape") and node.meta["tensor_meta"].shape == (1, self._elements(node)):
            self._flatten(node)
        elif (bare == "adaptive_avg_pool2d" and node.args[1] in (1, (1, 1))) or (
            bare == "mean" and _argument(node, 1, "dim") in ((2, 3), [2, 3], (-2, -1), [-2, -1])
        ):
            self._global_pool(node, path)
        else:
            raise AdderkitError(f"{path} calls {bare}, which integer plans cannot express; {_REMEDY}")
        if (name.endswith("_") and not name.endswith("__")) or _argument(node, 1, "inplace") is True:
            self._alias(node)

    def _bounds(self, path: str, module: nn.Module) -> tuple[float, float]:
        if isinstance(module, nn.ReLU):
            return 0.0, math.inf
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return float(module.min_val), float(module.max_val)
        raise AdderkitError(f"{path} is a {type(module).__name__}, which integer plans cannot express; {_REMEDY}")

    def _layer(self, node: fx.Node, path: str, module: nn.Conv2d | nn.Linear) -> None:
        value, number = self._layer_input(node.args[0])
        _, height, width = self.shapes[number]
        kind: OpKind = "adder" if isinstance(module, AdderConv2d) else "convolution"
        norms = (f"{path}.normalization",) if isinstance(module, NormalizedAdderConv2d) else ()
        if (value.flat and (height, width) != (1, 1)) or isinstance(module, nn.Linear):
            if isinstance(module, nn.Linear) and len(node.meta["tensor_meta"].shape) != 2:
                raise AdderkitError(f"{path} reads rows of pixels, which integer plans cannot express; {_REMEDY}")
            window, groups = Window((height, width), (1, 1), (0, 0), (1, 1)), 1
        else:
            window, groups = _window(path, module, (height, width)), module.groups
        self.values[node] = _Value(FusedOp(kind, path, number, window=window, groups=groups, norms=norms))

    def _normalize(self, node: fx.Node, path: str) -> None:
        value = self._fusible(node.args[0], path, before_residual=True)
        assert value.op is not None
        value.op = dataclasses.replace(value.op, norms=(*value.op.norms, path))
        self.values[node] = value

    def _clamp(self, node: fx.Node, source: Any, path: str, low: float, high: float) -> None:
        value = self.values[node] if source is node else self._fusible(source, path)
        assert value.op is not None
        low, high = max(low, value.op.low), min(high, value.op.high)
        value.op = dataclasses.replace(value.op, low=low, high=high)
        self.values[node] = value

    def _add(self, node: fx.Node, path: str) -> None:
        terms = (*node.args, *node.kwargs.values())
        sources = [value for value in terms if isinstance(value, fx.Node)]
        if (len(terms), len(sources)) != (2, 2) or self._shape(sources[0]) != self._shape(sources[1]):
            raise AdderkitError(f"{path} adds something other than one activation of the same size; {_REMEDY}")
        order = list(node.graph.nodes)
        first, second = sorted(sources, key=order.index)
        if not self._accepts_residual(second) and self._accepts_residual(first):
            first, second = second, first
        residual = self._materialize(first)
        value = self._fusible(second, path, before_residual=True)
        assert value.op is not None
        value.op = dataclasses.replace(value.op, residual=residual)
        self.values[node] = value

    def _accepts_residual(self, node: fx.Node) -> bool:
        op = self.values[node].op
        return op is not None and len(_users(node)) == 1 and not self._is_final(op)

    @staticmethod
    def _is_final(op: FusedOp) -> bool:
        """Return whether an operation already has a residual sum or a clamp, after which only a clamp can follow."""
        return op.residual is not None or op.clamps

    def _fusible(self, source: Any, path: str, before_residual: bool = False) -> _Value:
        """Return the operation of a node if more can be fused into it, else a new one that reads its result.

        Args:
            source: The node.
            path: Path of a new operation.
            before_residual: Whether the residual sum and the clamp must come after what is fused.
        """
        value = self._value_of(source, path)
        op = value.op
        if op is not None and len(_users(source)) == 1 and not (before_residual and self._is_final(op)):
            return value
        return _Value(FusedOp("rescale", path, self._materialize(source)), flat=value.flat)

    def _forward_through(self, node: fx.Node) -> None:
        """Let a node that returns its argument stand for the same value."""
        source = node.args[0]
        if len(_users(source)) > 1:
            self._materialize(source)
        self.values[node] = self._value_of(source, _path(node))

    def _flatten(self, node: fx.Node) -> None:
        source = node.args[0]
        value = self._value_of(source, _path(node))
        if self._shape(source)[1:] == (1, 1):
            self._forward_through(node)
        else:
            self.values[node] = _Value(None, self._materialize(source), flat=True)
            assert not value.flat

    def _max_pool(self, node: fx.Node, path: str, module: nn.MaxPool2d) -> None:
        number = self._materialize(node.args[0])
        kernel, stride, padding, dilation = (
            _pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        self.values[node] = _Value(FusedOp("max_pool", path, number, window=Window(kernel, stride, padding, dilation)))
        self._materialize(node)

    def _average_pool(self, node: fx.Node, path: str, module: nn.AvgPool2d) -> None:
        number = self._materialize(node.args[0])
        window = Window(_pair(module.kernel_size), _pair(module.stride), (0, 0), (1, 1))
        exact = window.output_size(*self.shapes[number][1:]) == self._shape(node)[1:]
        if _pair(module.padding) != (0, 0) or not exact or module.divisor_override:
            raise AdderkitError(f"{path} pads or rounds its size up, which integer plans cannot express; {_REMEDY}")
        self.values[node] = _Value(FusedOp("average_pool", path, number, window=window))

    def _global_pool(self, node: fx.Node, path: str) -> None:
        if self._shape(node.args[0])[1:] == (1, 1):
            self._forward_through(node)
            return
        number = self._materialize(node.args[0])
        size = self.shapes[number][1:]
        self.values[node] = _Value(FusedOp("average_pool", path, number, window=Window(size, size, (0, 0), (1, 1))))

    def _value_of(self, source: Any, path: str) -> _Value:
        if not isinstance(source, fx.Node) or source not in self.values:
            raise AdderkitError(
                f"{path} reads something that is not computed from the image, which integer plans cannot express"
            )
        return self.values[source]

    def _layer_input(self, source: Any) -> tuple[_Value, int]:
        value = self._value_of(source, "a layer")
        return value, value.number if value.flat else self._materialize(source)

    def _materialize(self, source: Any) -> int:
        """Finish the operation of a node and return the number of the activation that it writes."""
        value = self._value_of(source, "a layer")
        if value.flat:
            raise AdderkitError("flattened pixels are used by something other than a layer; " + _REMEDY)
        if value.op is not None:
            value.number = len(self.shapes)
            self.shapes.append(self._shape(source))
            self.ops.append(dataclasses.replace(value.op, output=value.number))
            value.op = None
        return value.number

    def _alias(self, node: fx.Node) -> None:
        """Let the argument of an in-place operation stand for its result from here on."""
        source = node.args[0]
        if isinstance(source, fx.Node):
            self.values[source] = self.values[node]

    def _shape(self, node: Any) -> tuple[int, int, int]:
        shape = tuple(node.meta["tensor_meta"].shape)
        return (shape[1], *shape[2:]) if len(shape) == 4 else (shape[1], 1, 1)

    def _elements(self, node: fx.Node) -> int:
        source = node.args[0]
        return math.prod(self._shape(source)) if isinstance(source, fx.Node) else 0


def _window(path: str, module: Any, size: tuple[int, int]) -> Window:
    """Return the window of a convolution on an input of the given size.

    Raises:
        AdderkitError: The convolution pads unequally or with other values than zero, or transforms its weight.
    """
    converter = converter_of(type(module))
    if not isinstance(module, AdderConv2d) and (converter is None or converter.folds_weight):
        raise AdderkitError(f"{path} is a {type(module).__name__}, expected a plain convolution or an adder layer")
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    by_size = type(module).__name__.endswith("Same")
    if by_size or module.padding == "same":
        left, right, top, bottom = same_padding(size, module)
        padding = (top, left) if (left, top) == (right, bottom) else None
    else:
        padding = (0, 0) if module.padding == "valid" else module.padding
    if padding is None or module.padding_mode != "zeros":
        raise AdderkitError(
            f"{path} pads more on one side (as TensorFlow does) or with other values than zero, which integer plans "
            "cannot express; choose the network without 'tf_' in its name"
        )
    return Window(kernel, stride, padding, dilation)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _users(node: Any) -> list[fx.Node]:
    """Return the nodes that use the values of a node, not only its shape."""
    return [user for user in node.users if user.op in ("output", "call_module") or node_name(user) not in SHAPE_QUERIES]


def _keeps_all(index: Any) -> bool:
    """Return whether an index only adds dimensions, as ``[:, :, None, None]`` does."""
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is None or entry is ... or entry == slice(None) for entry in entries)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _path(node: fx.Node) -> str:
    """Return the path of the module in which a function is called."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "") if stack else ""
