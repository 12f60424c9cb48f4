"""The dry run: a row for each convolution with the decision and its reason."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..adder_layers.conv import AdderConv2d
from .config import AdderConfig, matching, nearest_names
from .errors import NoModuleMatchedError
from .graph import Layer, is_normalisation, trace_layers

Decision = Literal["convert", "skip", "adder"]


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One convolution: what happens to it and why.

    Args:
        path: Module path.
        cls: Class name as found.
        decision: ``convert``, ``skip``, or ``adder`` where it is one already.
        reason: Why.
        normalisation: Path of the normalisation that follows, empty where none does.
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
    normalisation: str
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

    An adder layer's output is always negative and large, so a convolution that no normalisation follows is skipped:
    behind it an activation would be dead.

    Args:
        model: Any model; one from timm says itself what images it takes.
        config: Which modules to take.
        filter_fn: A last word in code: called as ``filter_fn(module, path)``, false means skip.
        example_input: ``[N, C, H, W]``, for models that do not say what images they take.

    Returns:
        Rows in order of execution.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input.
    """
    layers = trace_layers(model, example_input)
    modules = dict(model.named_modules())
    convolutions = [layer for layer in layers if isinstance(modules[layer.path], nn.Conv2d)]
    last = _classifier(model, layers)
    rows = []
    for position, layer in enumerate(convolutions):
        module = modules[layer.path]
        assert isinstance(module, nn.Conv2d)
        norm = next((path for path in layer.consumers if is_normalisation(modules[path])), "")
        decision, reason = _decide(module, layer, modules, config)
        if decision == "convert" and config.skip_first and position == 0:
            decision, reason = "skip", "first convolution"
        if decision == "convert" and config.skip_last and layer.path in last:
            decision, reason = "skip", "classifier"
        if decision == "convert" and filter_fn is not None and not filter_fn(module, layer.path):
            decision, reason = "skip", "filter_fn says no"
        rows.append(_row(module, layer, decision, reason, norm))
    result = ConversionPlan(config, tuple(rows))
    _check_matches(result, modules)
    return result


def _decide(
    module: nn.Conv2d, layer: Layer, modules: dict[str, nn.Module], config: AdderConfig
) -> tuple[Decision, str]:
    """The decision as far as the layer alone settles it."""
    if isinstance(module, AdderConv2d):
        return "adder", "is an adder layer"
    if matching(config.include, layer.path) is None:
        return "skip", "matches no include pattern"
    pattern = matching(config.exclude, layer.path)
    if pattern is not None:
        return "skip", f"excluded by {pattern!r}"
    if type(module) is not nn.Conv2d:
        return "skip", f"{type(module).__name__} does more than a convolution"
    if not layer.consumers:
        return "skip", "no normalisation follows"
    other = [path for path in layer.consumers if not is_normalisation(modules[path])]
    if other:
        return "skip", f"no normalisation follows, but {type(modules[other[0]]).__name__} {other[0]!r}"
    return "convert", f"followed by {type(modules[layer.consumers[0]]).__name__}"


def _classifier(model: nn.Module, layers: Sequence[Layer]) -> set[str]:
    """Paths of the last layer: what timm calls the classifier, else the last weight layer that runs."""
    timm_model: Any = model
    head = timm_model.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, nn.Module):
        inside = set(head.modules())
        return {path for path, module in model.named_modules() if module in inside}
    return {layers[-1].path} if layers else set()


def _row(module: nn.Conv2d, layer: Layer, decision: Decision, reason: str, normalisation: str) -> PlanRow:
    height, width = layer.output_shape[-2:]
    weight = module.weight
    return PlanRow(
        path=layer.path,
        cls=type(module).__name__,
        decision=decision,
        reason=reason,
        normalisation=normalisation,
        kernel=(weight.shape[2], weight.shape[3]),
        stride=(module.stride[0], module.stride[1]),
        groups=module.groups,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        terms=layer.calls * height * width * weight.numel(),
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
