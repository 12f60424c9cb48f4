"""The dry run: a row for each convolution with the decision and its reason."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ..errors import AdderkitError, NoModuleMatchedError
from ..graph.layers import WEIGHT_LAYERS, Layer, trace_layers
from ..graph.observe import is_normalization, normalizes_each_channel
from ..patterns import matching, nearest_names
from .config import AdderConfig
from .converters import converter_of, other_convolutions

Decision = Literal["convert", "skip", "adder"]


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One convolution: what happens to it and why.

    Args:
        path: Module path.
        cls: Class name as found.
        decision: ``convert``, ``skip``, or ``adder`` where it is one already.
        reason: Why.
        normalization: Path of the normalization that follows, empty where none does.
        inserted: Whether converting inserts a BatchNorm2d, because none follows.
        kernel: ``(height, width)``; ``stride`` likewise.
        stride: See ``kernel``.
        groups: Channel groups.
        in_channels: Channels of the input.
        out_channels: Number of filters.
        parameters: Number of parameters.
        terms: Distances (or products) for one image: ``O · H' · W' · C/groups · kh · kw``.
    """

    path: str
    cls: str
    decision: Decision
    reason: str
    normalization: str
    inserted: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    in_channels: int
    out_channels: int
    parameters: int
    terms: int


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What ``convert_`` would do to a model, row by row in order of execution."""

    config: AdderConfig
    rows: tuple[PlanRow, ...]

    def paths(self, decision: Decision) -> list[str]:
        """Module paths with that decision, in order of execution."""
        return [row.path for row in self.rows if row.decision == decision]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "config": self.config.to_dict(),
            "converted": len(self.paths("convert")),
            "skipped": len(self.paths("skip")),
            "already_adder": len(self.paths("adder")),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows], default=0)
        lines = [f"{row.path:<{width}}  {row.decision:<7}  {row.reason}" for row in self.rows]
        return "\n".join([*lines, f"{len(self.paths('convert'))} of {len(self.rows)} convolutions become adder layers"])


def plan(
    model: nn.Module,
    config: AdderConfig = AdderConfig(),  # noqa: B008 - frozen, hence safe as a default
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_input: Tensor | None = None,
) -> ConversionPlan:
    """Decide for each convolution whether it becomes an adder layer. Changes nothing.

    An adder layer's output is always negative and large: behind it an activation would be dead. So a convolution that
    no normalization follows gets one of its own, or is skipped, as ``config.norm`` says. Where GroupNorm or LayerNorm
    follows it converts either way, and ``insert`` gives it a BatchNorm before them.

    Args:
        model: Any model; one from timm says itself what images it takes.
        config: Which modules to take.
        filter_fn: A last word in code: called as ``filter_fn(module, path)``, false means skip.
        example_input: ``[N, C, H, W]``, for models that do not say what images they take.

    Returns:
        Rows in order of execution.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input, or a normalization is missing and ``norm`` is
            ``error``.
    """
    others = other_convolutions()
    layers = trace_layers(model, example_input, (*WEIGHT_LAYERS, *others), symbolic=True)
    modules = dict(model.named_modules())
    convolutions = [layer for layer in layers if not isinstance(modules[layer.path], nn.Linear)]
    last, shared = _classifier(model, layers), _shared_weights(modules)
    rows = []
    for position, layer in enumerate(convolutions):
        module = modules[layer.path]
        reason = _reason_to_stay(module, layer, config)
        if reason is None and type(module) in others:
            reason = others[type(module)]
        if reason is None and layer.path in shared:
            reason = f"shares its weight with {shared[layer.path]!r}"
        if reason is None and config.skip_first and position == 0:
            reason = "first convolution"
        if reason is None and config.skip_last and layer.path in last:
            reason = "classifier"
        if reason is None and filter_fn is not None and not filter_fn(module, layer.path):
            reason = "filter_fn says no"
        rows.append(_row(module, layer, modules, config, reason))
    result = ConversionPlan(config, tuple(rows))
    _check_matches(result, modules)
    return result


def _reason_to_stay(module: nn.Module, layer: Layer, config: AdderConfig) -> str | None:
    """Why the layer alone settles that it stays a convolution; ``None`` where it does not."""
    if matching(config.include, layer.path) is None:
        return "matches no include pattern"
    pattern = matching(config.exclude, layer.path)
    if pattern is not None:
        return f"excluded by {pattern!r}"
    if isinstance(module, nn.Conv2d) and converter_of(type(module)) is None:
        return f"{type(module).__name__} does more than a convolution"
    if config.skip_depthwise and isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return "depthwise"
    return None


def _successor(layer: Layer, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The normalization that takes the layer's output, or empty; and in words what takes it otherwise."""
    norm = next((path for path in layer.consumers if is_normalization(modules[path])), "")
    other = next((path for path in layer.consumers if not is_normalization(modules[path])), None)
    if other is not None:
        return norm, f"no normalization follows, but {type(modules[other]).__name__} {other!r}"
    function = next((name for name in layer.functions if name != "output"), None)
    if function is not None:
        return norm, f"no normalization follows, but {function}()"
    if norm and not layer.functions:
        return norm, ""
    return norm, "no normalization follows, but the output" if norm else "no normalization follows"


def _shared_weights(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Modules that hold a parameter which another module holds as well, and that other module."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return {
        path: next(other for other in paths if other != path)
        for paths in owners.values()
        if len(set(paths)) > 1
        for path in paths
    }


def _classifier(model: nn.Module, layers: Sequence[Layer]) -> set[str]:
    """Paths of the last layer: what timm calls the classifier, else the last weight layer that runs."""
    timm_model: Any = model
    head = timm_model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, nn.Module):
        inside = set(head.modules())
        return {path for path, module in model.named_modules() if module in inside}
    return {layers[-1].path} if layers else set()


def _row(module: Any, layer: Layer, modules: dict[str, nn.Module], config: AdderConfig, reason: str | None) -> PlanRow:
    norm, missing = _successor(layer, modules)
    decision: Decision = "convert" if reason is None else "skip"
    on_pixel = layer.input_shape[-2:] == layer.output_shape[-2:] == (1, 1)
    if isinstance(module, AdderConv2d):
        decision, reason = "adder", "is an adder layer"
    elif reason is None and not missing:
        successor = modules[norm]
        if config.norm != "insert" or normalizes_each_channel(successor):
            reason = f"followed by {type(successor).__name__}"
        missing = f"{type(successor).__name__} {norm!r} normalizes channels together"
    elif reason is None and config.skip_gates and on_pixel:
        decision, reason = "skip", "on a 1x1 map without normalization, as in a gate"
    elif reason is None and config.norm == "skip":
        decision, reason = "skip", missing
    elif reason is None and config.norm == "error":
        raise AdderkitError(
            f"{layer.path!r} would become an adder layer, but {missing}: exclude it, "
            "or take norm='insert' or 'skip' (--norm)"
        )
    inserted = reason is None
    height, width = layer.output_shape[-2:]
    kernel = (module.kernel_size[0], module.kernel_size[1])
    window = module.in_channels // module.groups * kernel[0] * kernel[1]
    return PlanRow(
        path=layer.path,
        cls=type(module).__name__,
        decision=decision,
        reason=f"{missing}: BatchNorm2d inserted" if reason is None else reason,
        normalization=norm,
        inserted=inserted,
        kernel=kernel,
        stride=(module.stride[0], module.stride[1]),
        groups=module.groups,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        terms=layer.calls * height * width * module.out_channels * window,
    )


def _check_matches(result: ConversionPlan, modules: dict[str, nn.Module]) -> None:
    """Warn of a pattern that matched no convolution; refuse a plan with nothing to do."""
    paths = [row.path for row in result.rows]
    if not paths:
        raise NoModuleMatchedError("the model runs no Conv2d, so there is nothing to convert")
    for kind, patterns in (("include", result.config.include), ("exclude", result.config.exclude)):
        for pattern in patterns:
            if not any(matching((pattern,), path) for path in paths):
                hint = _hint(pattern, paths, modules)
                if kind == "include" and len(patterns) == 1:
                    raise NoModuleMatchedError(
                        f"include pattern {pattern!r} matches none of {len(paths)} convolutions{hint}"
                    )
                warnings.warn(f"{kind} pattern {pattern!r} matches no convolution{hint}", stacklevel=3)
    if not result.paths("convert") and not result.paths("adder"):
        reasons = sorted({row.reason for row in result.rows})
        raise NoModuleMatchedError(
            f"none of {len(paths)} convolutions can become an adder layer: {'; '.join(reasons[:4])}"
        )


def _hint(pattern: str, paths: list[str], modules: dict[str, nn.Module]) -> str:
    if pattern in modules and not isinstance(modules[pattern], nn.Conv2d):
        return f"; {pattern!r} is a {type(modules[pattern]).__name__}: write '{pattern}.*' for what is inside"
    near = nearest_names(pattern, paths)
    return f"; nearest: {', '.join(near)}" if near else f"; the first is {paths[0]!r}" if paths else ""
