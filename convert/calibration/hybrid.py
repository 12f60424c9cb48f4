"""Hybrids: after calibration, the layers that suffer most go back to being the convolutions that they were."""

import copy
import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ..conversion.plan import ConversionPlan
from ..conversion.transforms import ADDER
from ..errors import AdderkitError
from ..record import forget_
from .batchnorm import reestimate_batchnorm_
from .batchnorm_shift import calibration_statistics
from .blockwise import match_blocks_
from .calibrate import CalibrationReport, batches_of
from .config import CalibrationConfig, HybridPolicy
from .layerwise import Progress


def layers_to_keep(
    plan: ConversionPlan, report: CalibrationReport, original: int, converted: int, policy: HybridPolicy
) -> dict[str, str]:
    """Choose the layers that go back to convolutions.

    Args:
        plan: What was converted.
        report: How faithful each layer is.
        original: Multiplications of the original for one image, see ``cost``.
        converted: Multiplications of the converted model: what stays in layers and normalizations anyway.
        policy: The rules; ``min_fidelity`` is applied first, and what it keeps counts towards the budget.

    Returns:
        The reason for each path.

    Raises:
        AdderkitError: No layer would be left, or the budget is spent before the first choice.
    """
    terms = {row.path: row.terms for row in plan.rows if row.decision == "convert"}
    fidelity = {layer.path: layer.correlation for layer in report.layers}
    kept: dict[str, str] = {}
    if policy.min_fidelity is not None:
        kept = {
            path: f"fidelity {value:.3f} is below {policy.min_fidelity:g}"
            for path, value in fidelity.items()
            if value < policy.min_fidelity
        }
    if policy.budget is not None:
        spent = converted + sum(terms[path] for path in kept)
        allowed = policy.budget * original
        if spent > allowed:
            raise AdderkitError(
                f"the budget is {policy.budget:.1%} of the multiplications, but {spent / original:.1%} stay "
                "in what is not converted: raise the budget, or convert more"
            )
        candidates = (path for path in fidelity if path not in kept)
        for path in sorted(candidates, key=lambda path: (fidelity[path] - 1) / terms[path]):
            if spent + terms[path] <= allowed:
                spent += terms[path]
                kept[path] = f"fidelity {fidelity[path]:.3f}, kept within {policy.budget:.1%} of the multiplications"
    if len(kept) == len(fidelity):
        best = max(fidelity.values(), default=0.0)
        raise AdderkitError(
            f"every calibrated layer would go back to a convolution (the best fidelity is {best:.3f}): lower "
            "min_fidelity or the budget, or calibrate on more images and with more steps"
        )
    return kept


def keep_convolutions_(
    student: nn.Module,
    teacher: nn.Module,
    paths: Collection[str],
    images: Tensor | Iterable[Tensor],
    config: CalibrationConfig = CalibrationConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    progress: Progress | None = None,
) -> None:
    """Turn some adder layers back into exactly the teacher's convolutions, in place; the others learn to go with them.

    The statistics of every BatchNorm are measured again, for what reaches them has changed.

    Args:
        student: The calibrated model.
        teacher: The original network.
        paths: Modules to turn back.
        images: As for ``calibrate_``.
        config: Settings of the joint fit of the adder layers that remain; its ``matching_steps`` of 0 skip it.
        progress: Called as ``progress(what, done, total)``.

    Raises:
        AdderkitError: A path is not an adder layer of the student.
    """
    modules = dict(student.named_modules(remove_duplicate=False))
    for path in paths:
        if not isinstance(modules.get(path), AdderConv2d):
            raise AdderkitError(f"{path!r} is no adder layer of the student, expected one that was converted")
    chosen = {id(modules[path]) for path in paths}
    for path in paths:
        _restore(modules[path], teacher.get_submodule(path))
    forget_(student, {path for path, module in modules.items() if id(module) in chosen}, (ADDER,))
    batches = batches_of(images, config.batch_size)
    with calibration_statistics(student, teacher, batches):
        match_blocks_(
            student,
            teacher,
            torch.cat(batches),
            config,
            generator=torch.Generator().manual_seed(config.seed),
            progress=progress or (lambda what, done, total: None),
        )
        reestimate_batchnorm_(student, batches)


def _restore(layer: nn.Module, original: nn.Module) -> None:
    """Give a module the class and state of another, but its own mode, hooks, device and dtype."""
    weight: Any = layer.weight
    twin = copy.deepcopy(original).to(weight.device, weight.dtype).requires_grad_(weight.requires_grad)
    own = {name: value for name, value in vars(layer).items() if name.endswith("_hooks") or name == "training"}
    layer.__class__ = type(original)
    layer.__dict__.clear()
    layer.__dict__.update({**vars(twin), **own})


def kept_plan(plan: ConversionPlan, kept: dict[str, str]) -> ConversionPlan:
    """The plan with the layers that went back as skipped, and why."""
    rows = tuple(
        dataclasses.replace(row, decision="skip", reason=kept[row.path], inserted=False) if row.path in kept else row
        for row in plan.rows
    )
    return dataclasses.replace(plan, rows=rows)
