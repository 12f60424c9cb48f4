"""Plan of a conversion: a row for each convolution with the decision and its reason."""

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import AdderkitError, NoModuleMatchedError
from ..graph.layers import WEIGHT_LAYERS, Layer, trace_layers
from ..patterns import matching, nearest_names
from ..wrappers import unwrapped
from .config import AdderConfig
from .converters import OTHER_CONVOLUTIONS
from .decisions import Decision, Verdict, classifier_paths, decide, reason_to_skip, shared_weights, successor_of
from .reparameterize import advise_to_merge_first
from .targets import ADDER, Target, target_named

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """Decision about one convolution, and the facts about it.

    Args:
        path: Module path.
        cls: Name of the module's class.
        decision: ``convert``, ``skip``, or ``converted`` if it is converted already.
        reason: Why, in words.
        normalization: Path of the normalization that follows; empty if none does.
        inserted: Whether converting inserts a BatchNorm2d.
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal stride.
        groups: Number of channel groups.
        in_channels: Number of input channels.
        out_channels: Number of filters.
        parameters: Number of parameters.
        products: Number of products of the convolution for one image, ``O · H' · W' · C/groups · kh · kw``; an adder
            layer computes as many distances for each term.
        terms: Terms of each weight of the converted layer; 1 for one that is skipped.
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
    products: int
    terms: int = 1

    @property
    def additions_per_term(self) -> int:
        """Additions of one more term for one image: two for each distance, and one for each output."""
        height, width = self.kernel
        return 2 * self.products + self.products // (self.in_channels // self.groups * height * width)


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """Decisions of a conversion, before anything is changed.

    Args:
        config: The configuration that the plan was made with.
        rows: Convolutions in order of execution.
        target: Name of the target.
    """

    config: AdderConfig
    rows: tuple[PlanRow, ...]
    target: str = ADDER

    def paths(self, decision: Decision) -> list[str]:
        """Return the module paths with a decision, in order of execution."""
        return [row.path for row in self.rows if row.decision == decision]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "config": self.config.to_dict(),
            "to": self.target,
            "converted": len(self.paths("convert")),
            "skipped": len(self.paths("skip")),
            "already_converted": len(self.paths("converted")),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        width = max([len(row.path) for row in self.rows], default=0)
        lines = [f"{row.path:<{width}}  {row.decision:<9}  {row.reason}{_several(row)}" for row in self.rows]
        count = f"{len(self.paths('convert'))} of {len(self.rows)}"
        return "\n".join([*lines, f"{count} convolutions become {self.target} layers"])


def plan(
    model: nn.Module,
    config: AdderConfig = AdderConfig(),  # noqa: B008 - frozen, hence safe as a default
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_input: Tensor | None = None,
    *,
    to: str = ADDER,
) -> ConversionPlan:
    """Decide for each convolution whether it is converted. The model is not changed.

    The output of an adder layer is always negative and large, so that an activation after it would be dead. Therefore
    a convolution that no normalization follows gets one of its own or is skipped, as ``config.norm`` says. A
    convolution before a GroupNorm or LayerNorm is converted in any case; ``insert`` adds a BatchNorm before them.

    Example:
        >>> model = timm.create_model("resnet18")
        >>> print(adderkit.plan(model, adderkit.AdderConfig(exclude=("layer1.*",))))

    Args:
        model: Any model. A timm model says what images it takes.
        config: Choice of the convolutions to convert.
        filter_fn: Called as ``filter_fn(module, path)`` for each convolution to convert; return false to skip it.
        example_input: ``[N, C, H, W]``, for models that do not say what images they take.
        to: Target of the conversion.

    Returns:
        The plan, with convolutions in order of execution.

    Raises:
        NoModuleMatchedError: Nothing can be converted and nothing has been.
        AdderkitError: The model cannot run on the example input, the target is unknown, or a normalization is missing
            and ``config.norm`` is ``error``.
    """
    target, model = target_named(to), unwrapped(model)
    layers = trace_layers(model, example_input, (*WEIGHT_LAYERS, *OTHER_CONVOLUTIONS), symbolic=True)
    modules = dict(model.named_modules())
    convolutions = [layer for layer in layers if not isinstance(modules[layer.path], nn.Linear)]
    last, shared = classifier_paths(model, layers, modules), shared_weights(modules)
    rows = []
    for position, layer in enumerate(convolutions):
        module = modules[layer.path]
        reason = reason_to_skip(module, layer, config)
        if reason is None and layer.path in shared:
            reason = f"shares its weight with {shared[layer.path]!r}"
        if reason is None and config.skip_first and position == 0:
            reason = "first convolution"
        if reason is None and config.skip_last and layer.path in last:
            reason = "classifier"
        if reason is None and filter_fn is not None and not filter_fn(module, layer.path):
            reason = "skipped by filter_fn"
        successor = successor_of(layer, modules)
        verdict = decide(module, layer, successor, config, target, reason)
        terms = {"convert": config.terms_of(layer.path), "converted": getattr(module, "terms", 1), "skip": 1}
        rows.append(_row(module, layer, successor.path, verdict, terms[verdict.decision]))
    result = ConversionPlan(config, tuple(rows), to)
    _check_terms(result, target)
    _check_matches(result, modules)
    if not result.paths("converted"):
        advise_to_merge_first(model)
    return result


def _row(module: Any, layer: Layer, normalization: str, verdict: Verdict, terms: int) -> PlanRow:
    height, width = layer.output_shape[-2:]
    kernel = (module.kernel_size[0], module.kernel_size[1])
    window = module.in_channels // module.groups * kernel[0] * kernel[1]
    return PlanRow(
        path=layer.path,
        cls=type(module).__name__,
        decision=verdict.decision,
        reason=verdict.reason,
        normalization=normalization,
        inserted=verdict.inserts_norm,
        kernel=kernel,
        stride=(module.stride[0], module.stride[1]),
        groups=module.groups,
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        products=layer.calls * height * width * module.out_channels * window,
        terms=terms,
    )


def _several(row: PlanRow) -> str:
    return f", {row.terms} terms" if row.terms > 1 else ""


def _check_terms(result: ConversionPlan, target: Target) -> None:
    row = next((row for row in result.rows if row.terms > 1 and row.decision == "convert"), None)
    if row is not None and not target.has_terms:
        raise AdderkitError(
            f"{row.path!r} would have {row.terms} terms, but weights of {target.name} layers have one: leave out terms "
            "(--terms)"
        )


def _check_matches(result: ConversionPlan, modules: dict[str, nn.Module]) -> None:
    """Warn about patterns that match no convolution, and refuse a plan with nothing to do."""
    paths = [row.path for row in result.rows]
    if not paths:
        raise NoModuleMatchedError(f"the model runs no Conv2d, which adder layers replace; {_layers_of(modules)}")
    idle = [path for path, module in modules.items() if type(module) is nn.Conv2d and path not in paths]
    if idle:
        do = "does not run" if len(idle) == 1 else f"and {len(idle) - 1} other convolutions do not run"
        stay = "stays a convolution" if len(idle) == 1 else "stay convolutions"
        _logger.warning("%r %s in evaluation mode, and %s", idle[0], do, stay)
    config = result.config
    lists = {"include": config.include, "exclude": config.exclude, "terms": config.term_patterns}
    for kind, patterns in lists.items():
        for pattern in patterns:
            if not any(matching((pattern,), path) for path in paths):
                hint = _hint(pattern, paths, modules)
                if kind == "include" and len(patterns) == 1:
                    raise NoModuleMatchedError(
                        f"include pattern {pattern!r} matches none of {len(paths)} convolutions{hint}"
                    )
                warnings.warn(f"{kind} pattern {pattern!r} matches no convolution{hint}", stacklevel=3)
    if not result.paths("convert") and not result.paths("converted"):
        reasons = sorted({row.reason for row in result.rows})
        raise NoModuleMatchedError(f"none of {len(paths)} convolutions can be converted: {'; '.join(reasons[:4])}")


def _layers_of(modules: dict[str, nn.Module]) -> str:
    """Return what layers a model has instead, those that convolve first."""
    kinds = Counter(type(module).__name__ for module in modules.values() if not any(module.children()))
    first = sorted(kinds, key=lambda kind: ("Conv" not in kind, "Linear" not in kind, -kinds[kind]))
    return "it has " + (", ".join(f"{kinds[kind]} {kind}" for kind in first[:3]) or "no layers")


def _hint(pattern: str, paths: list[str], modules: dict[str, nn.Module]) -> str:
    if pattern in modules and not isinstance(modules[pattern], nn.Conv2d):
        return f"; {pattern!r} is a {type(modules[pattern]).__name__}: write '{pattern}.*' for the modules in it"
    near = nearest_names(pattern, paths)
    return f"; nearest: {', '.join(near)}" if near else f"; the first is {paths[0]!r}" if paths else ""
