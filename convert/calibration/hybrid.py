"""Networks whose layers differ: in the terms of their weights, or because some are turned back into convolutions.

Both choices go by fidelity. Terms are chosen before the calibration, from fits of each layer with one to four terms;
layers are turned back after it.
"""

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...adder_layers.conv import AdderConv2d
from ..conversion.config import AdderConfig
from ..conversion.plan import ConversionPlan
from ..conversion.reparameterize import guard_merges_
from ..conversion.rewrite import convert_
from ..conversion.targets import TARGETS
from ..conversion.transforms import restore_convolution_
from ..errors import AdderkitError
from ..graph.modes import batches_of
from ..record import forget_
from .batchnorm import reestimate_batchnorm_
from .batchnorm_shift import calibration_statistics
from .blockwise import match_blocks_
from .calibrate import CalibrationReport, calibrate_
from .config import CalibrationConfig, HybridPolicy, TermPolicy
from .workload import Progress

_logger = logging.getLogger(__name__)
MOST_CHOSEN_TERMS = 4  # take as much area as products with 8-bit weights


def choose_terms(
    teacher: nn.Module,
    config: AdderConfig,
    images: Tensor,
    additions: int,
    policy: TermPolicy,
    calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008 - frozen, hence safe as a default
    *,
    progress: Progress | None = None,
) -> AdderConfig:
    """Choose the terms of each layer by the fidelity that it gains per addition, measured by fits of every layer.

    Args:
        teacher: The network to convert; it is not changed.
        config: Choice of the convolutions to convert; its terms are ignored.
        images: Calibration images ``[N, C, H, W]``, as for ``calibrate_``.
        additions: Additions of the network with one term in each layer for one image, as counted by ``cost``.
        policy: The aim.
        calibration: Settings of the fits; there is no joint fit.
        progress: Called as ``progress(what, done, total)``.

    Returns:
        The configuration with the terms of each layer.
    """
    alone = dataclasses.replace(calibration, matching_steps=0)
    fidelity: dict[str, list[float]] = {}
    prices: dict[str, int] = {}
    for terms in range(1, MOST_CHOSEN_TERMS + 1):
        student = copy.deepcopy(teacher)
        plan = convert_(student, dataclasses.replace(config, terms=terms), example_input=images[:1])
        prices = {row.path: row.additions_per_term for row in plan.rows if row.decision == "convert"}

        def report(what: str, done: int, total: int, before: int = terms - 1) -> None:
            if progress is not None:
                progress(what, before * total + done, MOST_CHOSEN_TERMS * total)

        for layer in calibrate_(student, teacher, images, alone, progress=report).layers:
            fidelity.setdefault(layer.path, []).append(layer.correlation)
    chosen = best_terms(prices, fidelity, additions, policy)
    return dataclasses.replace(config, terms={path: terms for path, terms in chosen.items() if terms > 1} or 1)


def best_terms(
    prices: Mapping[str, int], fidelity: Mapping[str, list[float]], additions: int, policy: TermPolicy
) -> dict[str, int]:
    """Add terms to layers until the first aim is met, those first that gain most fidelity per addition.

    Args:
        prices: Additions of one more term for one image, by layer.
        fidelity: Fidelity of each layer with one term, two terms and so on.
        additions: Additions of the network with one term in each layer.
        policy: The aim.

    Returns:
        The number of terms of each layer.
    """
    chosen = dict.fromkeys(fidelity, 1)
    left = float("inf") if policy.additions is None else policy.additions * additions - additions

    def mean() -> float:
        return sum(fidelity[path][terms - 1] for path, terms in chosen.items()) / len(chosen)

    while policy.fidelity is None or mean() < policy.fidelity:
        steps = [
            ((fidelity[path][more - 1] - fidelity[path][now - 1]) / (prices[path] * (more - now)), path, more)
            for path, now in chosen.items()
            for more in range(now + 1, len(fidelity[path]) + 1)
            if prices[path] * (more - now) <= left
        ]
        gain, path, more = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            if policy.additions is None:
                _logger.warning("terms reach a mean fidelity of %.3f, short of %.3f", mean(), policy.fidelity)
            break
        left -= prices[path] * (more - chosen[path])
        chosen[path] = more
    return chosen


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
