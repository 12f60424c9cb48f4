"""A model cut into the stages of an integer plan: a layer with what follows it, up to where bytes are written.

Normalizations, a residual sum and an activation behind a layer are one affine function and a clamp, so they cost
nothing of their own once they are folded into the requantization of the layer's sums. A stage names modules by path and
holds no tensor; ``fake_quantize.py`` computes it in fp32, ``fold.py`` in integers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ...adder_layers.conv import AdderConv2d
from ...adder_layers.geometry import Window
from ...adder_layers.modules import NormalizedAdderConv2d, same_padding
from ..conversion.converters import converter_of
from ..errors import AdderkitError
from ..graph.fx_uses import UnitTracer
from ..graph.layers import input_size, meta_copy
from ..graph.observe import function_name

Kind = Literal["adder", "convolution", "linear", "rescale", "max_pool", "average_pool"]
WEIGHT_KINDS = ("adder", "convolution", "linear")
_PASSING = {"dropout", "dropout2d", "identity", "contiguous", "detach"}
_PASSING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_FORM = {"size", "dim", "shape", "ndim", "getattr", "_assert", "eq", "numel"}
POINT = Window((1, 1), (1, 1), (0, 0), (1, 1))
_REMEDY = "expected ReLU, ReLU6 or Hardtanh, BatchNorm, sums, max- and average pooling: choose a network of these"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What turns the bytes of one or two activations into those of another.

    Args:
        kind: What is summed; ``linear`` is the classifier, whose sums are the logits.
        path: Module that a reader looks for: the layer, or what stands alone.
        input: Number of the activation it reads.
        output: Number of the activation it writes.
        window: Of layers and pools.
        groups: Channel groups of a layer.
        norms: Paths of the normalizations of its sums, in order.
        residual: Number of the activation that is added behind them.
        low: What the result is clamped to, behind the sum; ``high`` likewise.
        high: See ``low``.
    """

    kind: Kind
    path: str
    input: int
    output: int = -1
    window: Window = POINT
    groups: int = 1
    norms: tuple[str, ...] = ()
    residual: int | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the activations it reads."""
        return (self.input,) if self.residual is None else (self.input, self.residual)


@dataclasses.dataclass(frozen=True)
class Stages:
    """A network in stages.

    Args:
        shapes: ``(channels, height, width)`` of each activation; number 0 is the image.
        stages: In order; each reads what an earlier one wrote.
    """

    shapes: tuple[tuple[int, int, int], ...]
    stages: tuple[Stage, ...]

    def consumers(self, number: int) -> list[Stage]:
        """The layers with weights that read an activation, also through max-pooling."""
        found = []
        for stage in self.stages:
            if number in stage.reads and stage.kind == "max_pool":
                found += self.consumers(stage.output)
            elif stage.input == number and stage.kind in WEIGHT_KINDS:
                found.append(stage)
        return found


def stages_of(model: nn.Module, image: tuple[int, int, int] | None = None) -> Stages:
    """Cut a model into stages.

    Args:
        model: A model that ``torch.fx`` can trace.
        image: ``(channels, height, width)``; by default what the model's timm configuration says.

    Raises:
        AdderkitError: The model does something that integer plans cannot express; the message names the module.
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
    return _Fusion(twin, image).run(graph)


@dataclasses.dataclass
class _Item:
    """What a node stands for: a stage that may take up more, or an activation that is written."""

    stage: Stage | None
    number: int = -1
    flat: bool = False  # [N, C·H·W] of an activation [C, H, W]


class _Fusion:
    """Walks a graph, and lets stages grow until something else needs their result."""

    def __init__(self, model: nn.Module, image: tuple[int, int, int]) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.shapes = [image]
        self.stages: list[Stage] = []
        self.items: dict[fx.Node, _Item] = {}

    def run(self, graph: fx.Graph) -> Stages:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.items[node] = _Item(None, 0)
            elif node.op == "output":
                self._finish(node)
            elif node.op == "call_module":
                self._module(node, self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._function(node, _name(node))
        return Stages(tuple(self.shapes), tuple(self.stages))

    def _finish(self, node: fx.Node) -> None:
        source = node.args[0]
        item = self.items.get(source) if isinstance(source, fx.Node) else None
        if item is None:
            raise AdderkitError("the model returns something else than logits, which integer plans cannot express")
        stage = item.stage
        plain = stage is not None and stage.residual is None and (stage.low, stage.high) == (-math.inf, math.inf)
        if stage is not None and plain and stage.kind == "convolution" and self._size(source)[1:] == (1, 1):
            item.stage = dataclasses.replace(stage, kind="linear")
        self._settled(source)
        if not self.stages or self.stages[-1].output != item.number:
            raise AdderkitError(f"the model returns something else than what its last layer writes; {_REMEDY}")

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        path = str(node.target)
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._layer(node, path, module)
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.running_mean is not None:
            self._affine(node, path)
            for child in (getattr(module, "drop", None), getattr(module, "act", None)):  # timm's BatchNormAct2d
                if isinstance(child, nn.Module) and not isinstance(child, _PASSING_MODULES):
                    self._clamp(node, node, path, *self._bounds(path, child))
        elif isinstance(module, _PASSING_MODULES):
            self._pass(node)
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
                self._replace(node)

    def _function(self, node: fx.Node, name: str) -> None:
        path = _path(node) or name
        bare = function_name(name)
        if bare in _FORM or not any(source in self.items for source in node.all_input_nodes):
            return
        if bare in ("add", "iadd"):
            self._add(node, path)
        elif bare in _PASSING or (bare == "getitem" and _keeps_all(node.args[1])):
            self._pass(node)
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
            self._replace(node)

    def _bounds(self, path: str, module: nn.Module) -> tuple[float, float]:
        if isinstance(module, nn.ReLU):
            return 0.0, math.inf
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return float(module.min_val), float(module.max_val)
        raise AdderkitError(f"{path} is a {type(module).__name__}, which integer plans cannot express; {_REMEDY}")

    def _layer(self, node: fx.Node, path: str, module: nn.Conv2d | nn.Linear) -> None:
        item, number = self._flat_or_settled(node.args[0])
        _, height, width = self.shapes[number]
        kind: Kind = "adder" if isinstance(module, AdderConv2d) else "convolution"
        norms = (f"{path}.normalization",) if isinstance(module, NormalizedAdderConv2d) else ()
        if (item.flat and (height, width) != (1, 1)) or isinstance(module, nn.Linear):
            if isinstance(module, nn.Linear) and len(node.meta["tensor_meta"].shape) != 2:
                raise AdderkitError(f"{path} reads rows of pixels, which integer plans cannot express; {_REMEDY}")
            window, groups = Window((height, width), (1, 1), (0, 0), (1, 1)), 1
        else:
            window, groups = _window(path, module, (height, width)), module.groups
        self.items[node] = _Item(Stage(kind, path, number, window=window, groups=groups, norms=norms))

    def _affine(self, node: fx.Node, path: str) -> None:
        item = self._open(node.args[0], path, before_residual=True)
        assert item.stage is not None
        item.stage = dataclasses.replace(item.stage, norms=(*item.stage.norms, path))
        self.items[node] = item

    def _clamp(self, node: fx.Node, source: Any, path: str, low: float, high: float) -> None:
        item = self.items[node] if source is node else self._open(source, path)
        assert item.stage is not None
        low, high = max(low, item.stage.low), min(high, item.stage.high)
        item.stage = dataclasses.replace(item.stage, low=low, high=high)
        self.items[node] = item

    def _add(self, node: fx.Node, path: str) -> None:
        terms = (*node.args, *node.kwargs.values())
        sources = [value for value in terms if isinstance(value, fx.Node)]
        if (len(terms), len(sources)) != (2, 2) or self._size(sources[0]) != self._size(sources[1]):
            raise AdderkitError(f"{path} adds what is not just another activation of the same size; {_REMEDY}")
        order = list(node.graph.nodes)
        first, second = sorted(sources, key=order.index)
        if not self._takes_residual(second) and self._takes_residual(first):
            first, second = second, first
        residual = self._settled(first)
        item = self._open(second, path, before_residual=True)
        assert item.stage is not None
        item.stage = dataclasses.replace(item.stage, residual=residual)
        self.items[node] = item

    def _takes_residual(self, node: fx.Node) -> bool:
        stage = self.items[node].stage
        bounded = stage is not None and (stage.low, stage.high) != (-math.inf, math.inf)
        return stage is not None and len(_users(node)) == 1 and stage.residual is None and not bounded

    def _open(self, source: Any, path: str, before_residual: bool = False) -> _Item:
        """The stage behind a node, to take something up; a fresh one where it cannot, or others need it as it is."""
        item = self._item(source, path)
        if item.stage is not None and len(_users(source)) == 1:
            bounded = (item.stage.low, item.stage.high) != (-math.inf, math.inf)
            if not before_residual or (item.stage.residual is None and not bounded):
                return item
        return _Item(Stage("rescale", path, self._settled(source)), flat=item.flat)

    def _pass(self, node: fx.Node) -> None:
        source = node.args[0]
        if len(_users(source)) > 1:
            self._settled(source)
        self.items[node] = self._item(source, _path(node))

    def _flatten(self, node: fx.Node) -> None:
        source = node.args[0]
        item = self._item(source, _path(node))
        if self._size(source)[1:] == (1, 1):
            self._pass(node)
        else:
            self.items[node] = _Item(None, self._settled(source), flat=True)
            assert not item.flat

    def _max_pool(self, node: fx.Node, path: str, module: nn.MaxPool2d) -> None:
        number = self._settled(node.args[0])
        kernel, stride, padding, dilation = (
            _pair(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        self.items[node] = _Item(Stage("max_pool", path, number, window=Window(kernel, stride, padding, dilation)))
        self._settled(node)

    def _average_pool(self, node: fx.Node, path: str, module: nn.AvgPool2d) -> None:
        number = self._settled(node.args[0])
        window = Window(_pair(module.kernel_size), _pair(module.stride), (0, 0), (1, 1))
        exact = window.output_size(*self.shapes[number][1:]) == self._size(node)[1:]
        if _pair(module.padding) != (0, 0) or not exact or module.divisor_override:
            raise AdderkitError(f"{path} pads or rounds its size up, which integer plans cannot express; {_REMEDY}")
        self.items[node] = _Item(Stage("average_pool", path, number, window=window))

    def _global_pool(self, node: fx.Node, path: str) -> None:
        if self._size(node.args[0])[1:] == (1, 1):
            self._pass(node)
            return
        number = self._settled(node.args[0])
        size = self.shapes[number][1:]
        self.items[node] = _Item(Stage("average_pool", path, number, window=Window(size, size, (0, 0), (1, 1))))

    def _item(self, source: Any, path: str) -> _Item:
        if not isinstance(source, fx.Node) or source not in self.items:
            raise AdderkitError(f"{path} reads what does not come from the image, which integer plans cannot express")
        return self.items[source]

    def _flat_or_settled(self, source: Any) -> tuple[_Item, int]:
        item = self._item(source, "a layer")
        return item, item.number if item.flat else self._settled(source)

    def _settled(self, source: Any) -> int:
        """Number of the activation that a node stands for; its stage is finished."""
        item = self._item(source, "a layer")
        if item.flat:
            raise AdderkitError("flattened pixels are used by something else than a layer; " + _REMEDY)
        if item.stage is not None:
            item.number = len(self.shapes)
            self.shapes.append(self._size(source))
            self.stages.append(dataclasses.replace(item.stage, output=item.number))
            item.stage = None
        return item.number

    def _replace(self, node: fx.Node) -> None:
        """Behind an operation in place, the name of what it changed stands for the result."""
        source = node.args[0]
        if isinstance(source, fx.Node):
            self.items[source] = self.items[node]

    def _size(self, node: Any) -> tuple[int, int, int]:
        shape = tuple(node.meta["tensor_meta"].shape)
        return (shape[1], *shape[2:]) if len(shape) == 4 else (shape[1], 1, 1)

    def _elements(self, node: fx.Node) -> int:
        source = node.args[0]
        return math.prod(self._size(source)) if isinstance(source, fx.Node) else 0


def _window(path: str, module: Any, size: tuple[int, int]) -> Window:
    """The window of a convolution on an input of that size.

    Raises:
        AdderkitError: It pads otherwise than by the same zeros on both sides, or transforms its weight.
    """
    handler = converter_of(type(module))
    if not isinstance(module, AdderConv2d) and (handler is None or handler.folds_weight):
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
            f"{path} pads more on one side (as TensorFlow does) or by other values than zero, which integer plans "
            "cannot express; choose the network without 'tf_' in its name"
        )
    return Window(kernel, stride, padding, dilation)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _users(node: Any) -> list[fx.Node]:
    """What uses a node's values, and not only its form."""
    return [
        user for user in node.users if user.op in ("output", "call_module") or function_name(_name(user)) not in _FORM
    ]


def _name(node: fx.Node) -> str:
    target: str | Callable[..., Any] = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "function")


def _keeps_all(index: Any) -> bool:
    """Whether an index only adds dimensions, as ``[:, :, None, None]`` does."""
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is None or entry is ... or entry == slice(None) for entry in entries)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _path(node: fx.Node) -> str:
    """Path of the module in which a function is called."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "") if stack else ""
