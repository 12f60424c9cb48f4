"""Hybrid networks: after calibration, the layers that lose most fidelity are turned back into convolutions."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ..conversion.plan import ConversionPlan
from ..conversion.reparameterize import guard_merges_
from ..conversion.targets import TARGETS
from ..conversion.transforms import restore_convolution_
from ..errors import AdderkitError
from ..graph.modes import batches_of
from ..record import forget_
from .batchnorm import reestimate_batchnorm_
from .batchnorm_shift import calibration_statistics
from .blockwise import match_blocks_
from .calibrate import CalibrationReport
from .config import CalibrationConfig, HybridPolicy
from .layerwise import Progress


def layers_to_keep(
    plan: ConversionPlan, report: CalibrationReport, original: int, converted: int, policy: HybridPolicy
) -> dict[str, str]:
    """Choose the layers to turn back into convolutions.

    Args:
        plan: Plan of the conversion.
        report: Report of the calibration, with the fidelity of each layer.
        original: Multiplications of the original network for one image, as counted by ``cost``.
        converted: Multiplications of the converted model for one image, in unconverted layers and normalizations.
        policy: The rules. ``min_fidelity`` is applied first; the layers that it chooses count towards the budget.

    Returns:
        The reason for each chosen layer, by path.

    Raises:
        AdderkitError: If every layer would be chosen, or the converted model already exceeds the budget.
    """
    products = {row.path: row.products for row in plan.rows if row.decision == "convert"}
    fidelity = {layer.path: layer.correlation for layer in report.layers}
    kept: dict[str, str] = {}
    if policy.min_fidelity is not None:
        kept = {
            path: f"fidelity {value:.3f} is below {policy.min_fidelity:g}"
            for path, value in fidelity.items()
            if value < policy.min_fidelity
        }
    if policy.budget is not None:
        spent = converted + sum(products[path] for path in kept)
        allowed = policy.budget * original
        if spent > allowed:
            raise AdderkitError(
                f"the budget is {policy.budget:.1%} of the multiplications, but {spent / original:.1%} remain in "
                "layers that are not converted: raise the budget, or convert more layers"
            )
        candidates = (path for path in fidelity if path not in kept)
        for path in sorted(candidates, key=lambda path: (fidelity[path] - 1) / products[path]):
            if spent + products[path] <= allowed:
                spent += products[path]
                kept[path] = f"fidelity {fidelity[path]:.3f}, kept within {policy.budget:.1%} of the multiplications"
    if len(kept) == len(fidelity):
        best = max(fidelity.values(), default=0.0)
        raise AdderkitError(
            f"every calibrated layer would be turned back into a convolution (the best fidelity is {best:.3f}): lower "
            "min_fidelity or the budget, or calibrate on more images or with more steps"
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
    """Turn some adder layers back into the teacher's convolutions, in place, and fit the others to the new network.

    All BatchNorm statistics are re-estimated, since their inputs have changed.

    Args:
        student: The calibrated model.
        teacher: The original network.
        paths: Paths of the layers to turn back.
        images: Calibration images ``[N, C, H, W]``, or batches of them, as for ``calibrate_``.
        config: Settings of the joint fit of the remaining adder layers, which ``matching_steps=0`` skips.
        progress: Called as ``progress(what, done, total)``.

    Raises:
        AdderkitError: If a path is not an adder layer of the student.
    """
    modules = dict(student.named_modules(remove_duplicate=False))
    chosen: dict[AdderConv2d, nn.Conv2d] = {}
    for path in paths:
        layer = modules.get(path)
        if not isinstance(layer, AdderConv2d):
            raise AdderkitError(f"{path!r} is not an adder layer of the student, expected a converted layer")
        original = teacher.get_submodule(path)
        assert isinstance(original, nn.Conv2d)
        chosen[layer] = original
    for layer, original in chosen.items():
        restore_convolution_(layer, original)
    guard_merges_(student)
    forget_(student, {path for path, module in modules.items() if module in chosen}, TARGETS)
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


def kept_plan(plan: ConversionPlan, kept: dict[str, str]) -> ConversionPlan:
    """Return the plan with the layers that were turned back as skipped, each with its reason."""
    skipped: dict[str, Any] = {"decision": "skip", "inserted": False, "terms": 1}
    rows = tuple(
        dataclasses.replace(row, reason=kept[row.path], **skipped) if row.path in kept else row for row in plan.rows
    )
    return dataclasses.replace(plan, rows=rows)
