"""The ``convert`` verb's work: build a model, convert it, calibrate it on unlabeled images, save it."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...convert.calibration.calibrate import CalibrationReport, calibrate_
from ...convert.calibration.config import CalibrationConfig, HybridPolicy, parse_budget
from ...convert.calibration.hybrid import keep_convolutions_, kept_plan, layers_to_keep
from ...convert.checkpoint.folder import read_report, save
from ...convert.conversion.config import AdderConfig, Norm
from ...convert.conversion.plan import ConversionPlan, plan
from ...convert.conversion.rewrite import convert_, is_converted
from ...convert.cost.count import cost
from ...convert.errors import AdderkitError, ModelSourceError
from ...convert.model_source import build_model, check_target, default_folder, is_folder
from ...convert.record import require_float
from ..data.datasets import unlabeled_images
from ..runs.progress import calibration_progress
from ..runs.provenance import command_line, commands_of, teacher_source, weights_source


@dataclasses.dataclass(frozen=True)
class ConversionJob:
    """What to convert and how; see the options of ``adderkit convert``."""

    model: str
    output: str | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    skip_first: bool = True
    skip_last: bool = True
    skip_depthwise: bool = False
    skip_gates: bool = True
    norm: Norm = "insert"
    min_fidelity: float | None = None
    budget: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    images: int = 512
    steps: int = 240
    matching_steps: int = 120
    memory: float = 2.0
    seed: int = 0
    checkpoint: str | None = None
    pretrained: bool = True
    num_classes: int | None = None
    in_chans: int | None = None

    @property
    def config(self) -> AdderConfig:
        """The part that decides which layers are converted."""
        return AdderConfig(
            include=self.include,
            exclude=self.exclude,
            skip_first=self.skip_first,
            skip_last=self.skip_last,
            skip_depthwise=self.skip_depthwise,
            skip_gates=self.skip_gates,
            norm=self.norm,
        )

    @property
    def calibration(self) -> CalibrationConfig:
        """The part that decides how the layers are fitted."""
        memory = int(self.memory * (1 << 30))
        return CalibrationConfig(steps=self.steps, matching_steps=self.matching_steps, memory=memory, seed=self.seed)

    @property
    def policy(self) -> HybridPolicy:
        """The part that decides, after calibration, which layers go back."""
        return HybridPolicy(self.min_fidelity, None if self.budget is None else parse_budget(self.budget))

    @property
    def folder(self) -> Path:
        """``--output``, or ``<model>-adder`` in the current folder."""
        return default_folder(self.model, "-adder") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """What was done; ``folder`` is ``None`` after a dry run."""

    plan: ConversionPlan
    calibration: CalibrationReport | None
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "plan": self.plan.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "output": str(self.folder) if self.folder else None,
        }

    def summary(self) -> str:
        """What a person wants to know last."""
        converted = f"{len(self.plan.paths('convert'))} of {len(self.plan.rows)} convolutions"
        # The calibration also has the layers that went back.
        back = len(self.calibration.layers) - len(self.plan.paths("convert")) if self.calibration else 0
        if self.folder is None:
            return f"{converted} would become adder layers; nothing was written (--dry-run)"
        if self.calibration is None:
            return (
                f"{converted} became adder layers in {self.folder}/, not calibrated: its accuracy is near chance. "
                "Convert again with --dataset to calibrate, or fine-tune it"
            )
        hybrid = f"; {back} went back to convolutions" if back else ""
        images = self.calibration.images
        return f"{converted} became adder layers in {self.folder}/, calibrated on {images} images{hybrid}"


def run_conversion(job: ConversionJob, *, dry_run: bool, announce: Callable[[str], None]) -> ConversionResult:
    """Carry out a conversion.

    Args:
        job: What to convert and how.
        dry_run: Only plan; needs no weights and writes nothing.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be had, or nothing can be converted.
    """
    reason = ", which is needed as teacher"
    check_target(job.model, job.folder, write=not dry_run, checkpoint=job.checkpoint, reason=reason)
    if job.policy.acts and job.dataset is None:
        raise AdderkitError("--min-fidelity and --budget act on calibrated layers; give --dataset to calibrate on")
    wanted = {"num_classes": job.num_classes, "in_chans": job.in_chans}
    pretrained = job.pretrained and (not dry_run or is_folder(job.model))
    model = build_model(job.model, pretrained=pretrained, checkpoint=job.checkpoint, **wanted)
    require_float(model, "converted", "convert the CNN that it was made from")
    if is_converted(model):
        raise ModelSourceError(f"{job.model} is an adder network already; convert the CNN it was made from")
    if dry_run:
        return ConversionResult(plan(model, job.config), None, None)
    announce(f"converting {job.model}")
    student = copy.deepcopy(model)
    done = convert_(student, job.config)
    calibration = None
    if job.dataset is not None:
        announce(f"calibrating on {job.images} unlabeled images of {job.dataset}")
        images = unlabeled_images(job.dataset, job.data_dir, student, job.images, seed=job.seed)
        done, calibration = _calibrate(student, model, images, done, job, announce)
    report = {
        "plan": done.to_dict(),
        "calibration": calibration.to_dict() if calibration else None,
        "teacher": teacher_source(job.model, model, pretrained=job.pretrained, checkpoint=job.checkpoint),
        "source": weights_source(job.model, model, pretrained=job.pretrained, checkpoint=job.checkpoint),
        "commands": commands_of(_report_of(job.model), command_line()),
    }
    save(student, job.folder, report)
    return ConversionResult(done, calibration, job.folder)


def _calibrate(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    done: ConversionPlan,
    job: ConversionJob,
    announce: Callable[[str], None],
) -> tuple[ConversionPlan, CalibrationReport]:
    """Calibrate, with the layers that go back chosen between their own fit and that of all together."""
    policy, config = job.policy, job.calibration
    with calibration_progress() as progress:
        report = calibrate_(
            student,
            teacher,
            images,
            dataclasses.replace(config, matching_steps=0) if policy.acts else config,
            state=job.folder / ".calibration",  # not beside it, where perhaps nothing may be written
            progress=progress,
        )
        if not policy.acts:
            return done, report
        kept = layers_to_keep(done, report, cost(teacher).multiplications, cost(student).multiplications, policy)
        announce(f"{len(kept)} of {len(report.layers)} layers go back to convolutions")
        keep_convolutions_(student, teacher, kept, images, config, progress=progress)
    return kept_plan(done, kept), dataclasses.replace(report, config=config)


def _report_of(name: str) -> dict[str, Any]:
    return read_report(name.removeprefix("local-dir:")) if is_folder(name) else {}
