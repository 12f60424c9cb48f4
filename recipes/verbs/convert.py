"""``adderkit convert``: convert a CNN to an adder network and calibrate it on unlabeled images."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ...convert.calibration.config import Budget, CalibrationConfig, HybridPolicy, TermPolicy, parse_budget
from ...convert.conversion.config import AdderConfig, Norm, parse_terms
from ...convert.conversion.targets import ADDER, TARGETS
from ..data.unlabeled import UnlabeledImages
from ..terminal.options import (
    CalibrationImages,
    Checkpoint,
    DataDir,
    Dataset,
    Device,
    InChans,
    Json,
    NumClasses,
    Overwrite,
    Pretrained,
    TrainSplit,
    output_option,
    unlabeled_images,
)
from ..terminal.output import announce, print_json

if TYPE_CHECKING:
    from torch import nn

    from ...convert.calibration.calibrate import CalibrationReport
    from ...convert.checkpoint.report import Report
    from ...convert.conversion.plan import ConversionPlan
    from ...convert.model_source import ModelSource

    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]  # type checkers do not know that --to lists the table's names

_GB = 1 << 30
AUTO = "auto"

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="timm model name, hf-hub:… repository or saved folder.")
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules to convert: path, glob or re:REGEX.", show_default="all"),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Modules not to convert; overrides --include.")
]
SkipDepthwise = Annotated[bool, typer.Option(help="Keep depthwise convolutions.")]
SkipGates = Annotated[bool, typer.Option(help="Keep convolutions on 1x1 maps without normalization, as in gates.")]
Terms = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[PATTERN=]N", help="Terms of each weight, 1 to 8, or auto: chosen for each layer.", show_default="1"
    ),
]
Fidelity = Annotated[
    float | None, typer.Option(min=0, max=1, metavar="X", help="Mean fidelity that --terms auto is to reach.")
]
NormOption = Annotated[Norm, typer.Option(help="What to do where no normalization follows a convolution.")]
Reparameterize = Annotated[
    bool,
    typer.Option("--reparameterize", help="Merge branches and BatchNorms first, like timm.utils.reparameterize_model."),
]
MinFidelity = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="X", help="Revert layers with a fidelity below this to convolutions."),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        metavar="mults=N%,adds=N%",
        help="Revert the worst layers to convolutions, up to N% of the multiplications; limit of --terms auto.",
    ),
]
CalibrationSteps = Annotated[
    int, typer.Option(min=0, metavar="N", help="Adam steps for each layer; 0 only places their terms.")
]
MatchingSteps = Annotated[int, typer.Option(min=0, metavar="N", help="Adam steps of the joint fit of all layers.")]
Memory = Annotated[float, typer.Option(min=0.1, metavar="GB", help="Memory that calibration may use, in GB.")]


def convert(
    argument: ModelArgument = None,
    model: ModelOption = None,
    to: Annotated[TargetName, typer.Option(help="Layers that convolutions become.")] = ADDER,
    output: Annotated[str | None, output_option("DIR", "MODEL-TARGET")] = None,
    overwrite: Overwrite = False,
    include: Include = None,
    exclude: Exclude = None,
    skip_first: Annotated[bool, typer.Option(help="Keep the first convolution.")] = AdderConfig.skip_first,
    skip_last: Annotated[bool, typer.Option(help="Keep a convolutional classifier.")] = AdderConfig.skip_last,
    skip_depthwise: SkipDepthwise = AdderConfig.skip_depthwise,
    skip_gates: SkipGates = AdderConfig.skip_gates,
    norm: NormOption = AdderConfig.norm,
    terms: Terms = None,
    fidelity: Fidelity = None,
    reparameterize: Reparameterize = False,
    min_fidelity: MinFidelity = None,
    budget: BudgetOption = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    train_split: TrainSplit = None,
    calibration_images: CalibrationImages = UnlabeledImages.count,
    calibration_steps: CalibrationSteps = CalibrationConfig.steps,
    matching_steps: MatchingSteps = CalibrationConfig.matching_steps,
    calibration_memory: Memory = CalibrationConfig.memory / _GB,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of calibration.")] = CalibrationConfig.seed,
    device: Device = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan without writing anything.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print shapes and costs of each layer, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Convert a CNN to an adder network.

    With --dataset, also calibrate it on unlabeled training images.
    """
    from ...convert.model_source import ModelSource

    name = model if argument is None else argument
    if name is None or (argument is not None and model is not None):
        raise typer.BadParameter("give one model to convert, such as resnet50", param_hint="MODEL")
    config = AdderConfig(
        include=tuple(include or AdderConfig.include),
        exclude=tuple(exclude or AdderConfig.exclude),
        skip_first=skip_first,
        skip_last=skip_last,
        skip_depthwise=skip_depthwise,
        skip_gates=skip_gates,
        norm=norm,
        terms=1 if terms == [AUTO] else parse_terms(terms or ()),
    )
    limits = Budget() if budget is None else parse_budget(budget)
    memory = int(calibration_memory * _GB)
    calibration = CalibrationConfig(calibration_steps, matching_steps=matching_steps, memory=memory, seed=seed)
    hybrid = HybridPolicy(min_fidelity, limits.multiplications)
    job = ConversionJob(
        source=ModelSource(name, pretrained, checkpoint, num_classes, in_chans),
        config=config,
        calibration=calibration,
        hybrid=hybrid,
        terms=_term_policy(terms == [AUTO], fidelity, limits.additions),
        output=output,
        images=unlabeled_images(dataset, data_dir, train_split, calibration_images, seed),
        to=to,
        overwrite=overwrite,
        device=device,
        reparameterize=reparameterize,
    )
    result = run_conversion(job, dry_run=dry_run, announce=announce)
    print_json(result.to_dict()) if json else _print_result(result, verbose)


def _term_policy(auto: bool, fidelity: float | None, additions: float | None) -> TermPolicy | None:
    aims = fidelity is not None or additions is not None
    if auto and not aims:
        raise typer.BadParameter("give an aim: --fidelity 0.98 or --budget adds=125%", param_hint="--terms auto")
    if aims and not auto:
        raise typer.BadParameter("give --terms auto as well", param_hint="--fidelity, --budget adds=N%")
    return TermPolicy(fidelity, additions) if auto else None


def _print_result(result: "ConversionResult", verbose: bool) -> None:
    from ..terminal.plan_tables import full_plan_table, plan_table
    from ..terminal.tables import show

    show((full_plan_table if verbose else plan_table)(result.plan, result.calibration))
    print(result.summary())


@dataclasses.dataclass(frozen=True)
class ConversionJob:
    """Model to convert, and how to convert and calibrate it.

    Args:
        source: Model to convert.
        config: Choice of the convolutions to convert.
        calibration: Settings of calibration.
        hybrid: Rules for returning calibrated layers to convolutions.
        terms: Aim of the choice of each layer's terms; ``None`` for those of ``config``.
        output: Folder to write; by default ``<model>-<target>`` in the current folder.
        images: Images to calibrate on; ``None`` skips calibration.
        to: Target of the conversion.
        overwrite: Replace a saved model in the folder.
        device: Device to calibrate on; by default the GPU, if there is one.
        reparameterize: Merge branches and BatchNorms before the conversion.
    """

    source: "ModelSource"
    config: AdderConfig = dataclasses.field(default_factory=AdderConfig)
    calibration: CalibrationConfig = dataclasses.field(default_factory=CalibrationConfig)
    hybrid: HybridPolicy = dataclasses.field(default_factory=HybridPolicy)
    terms: TermPolicy | None = None
    output: str | None = None
    images: UnlabeledImages | None = None
    to: str = ADDER
    overwrite: bool = False
    device: str | None = None
    reparameterize: bool = False

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.source.default_output(f"-{self.to}") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """Outcome of a conversion; ``folder`` is ``None`` after a dry run."""

    plan: "ConversionPlan"
    calibration: "CalibrationReport | None"
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "plan": self.plan.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "output": str(self.folder) if self.folder else None,
        }

    def summary(self) -> str:
        """Return a one-line summary."""
        converted = f"{len(self.plan.paths('convert'))} of {len(self.plan.rows)} convolutions"
        # The calibration also lists the layers that returned to convolutions.
        returned = len(self.calibration.layers) - len(self.plan.paths("convert")) if self.calibration else 0
        if self.folder is None:
            return f"{converted} would become {self.plan.target} layers; nothing was written (--dry-run)"
        if self.calibration is None:
            return (
                f"{converted} became {self.plan.target} layers in {self.folder}/, not calibrated: its accuracy is near "
                "chance, and its outputs may be very large, since BatchNorm has the statistics of the CNN, until you "
                "convert again with --dataset to calibrate it, or fine-tune it"
            )
        hybrid = f"; {returned} returned to convolutions" if returned else ""
        images = self.calibration.images
        return f"{converted} became {self.plan.target} layers in {self.folder}/, calibrated on {images} images{hybrid}"


def run_conversion(job: ConversionJob, *, dry_run: bool, announce: Callable[[str], None]) -> ConversionResult:
    """Convert a model, calibrate it if the job names images, and save it.

    Args:
        job: Model to convert, and how.
        dry_run: Only plan; needs no weights and writes nothing.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be loaded, or nothing can be converted.
    """
    from ...convert.checkpoint.report import MODEL_FOLDER
    from ...convert.conversion.plan import plan
    from ...convert.errors import AdderkitError
    from ...convert.output import output_folder
    from ..distributed.device import compute_device

    job.source.refuse_target(job.folder, ", which is needed as teacher")
    if job.hybrid.acts and job.images is None:
        raise AdderkitError("--min-fidelity and --budget choose among calibrated layers: give --dataset")
    if job.terms is not None and job.images is None:
        raise AdderkitError("--terms auto chooses by fits of each layer: give --dataset")
    if job.images is not None and "calibration" not in TARGETS[job.to].supports:
        raise AdderkitError(f"layers of target {job.to} cannot be calibrated: leave out --dataset")
    if dry_run:
        if job.terms is not None:
            announce("calibration chooses the terms of each layer; the plan shows one")
        return ConversionResult(plan(_load_cnn(job, dry_run), job.config, to=job.to), None, None)
    with output_folder(job.folder, MODEL_FOLDER, overwrite=job.overwrite), compute_device(job.device) as device:
        return _convert(_load_cnn(job, dry_run).to(device), job, announce)


def _convert(model: "nn.Module", job: ConversionJob, announce: Callable[[str], None]) -> ConversionResult:
    from ...convert.checkpoint.configuration import check_savable
    from ...convert.conversion.rewrite import convert_
    from ...convert.graph.modes import device_of
    from ..runs.kept_teacher import KeptTeacher
    from ..runs.plan import device_name

    check_savable(model)
    config = job.config if job.terms is None else _choose_terms(model, job, announce)
    announce(f"converting {job.source.name}")
    student = copy.deepcopy(model)
    done = convert_(student, config, to=job.to)
    calibration = None
    if job.images is not None:
        check_savable(student)  # what saving needs is known before the long work
        announce(f"calibrating on {job.images}, on {device_name(device_of(model))}")
        done, calibration = _calibrate(student, model, job.images, done, job, announce)
    KeptTeacher.of_cnn(job.source, model).save_with(student, job.folder, _report(job, model, done, calibration))
    return ConversionResult(done, calibration, job.folder)


def _load_cnn(job: ConversionJob, dry_run: bool) -> "nn.Module":
    from ...convert.conversion.reparameterize import reparameterize_
    from ...convert.conversion.targets import is_converted
    from ...convert.errors import ModelSourceError
    from ...convert.record import require_float

    model = job.source.build(weights=not dry_run or job.source.folder is not None)
    require_float(model, "converted", "convert the CNN that it was made from")
    if is_converted(model):
        raise ModelSourceError(f"{job.source.name} is already converted; convert the CNN that it was made from")
    if job.reparameterize:
        reparameterize_(model)
    return model


def _choose_terms(model: "nn.Module", job: ConversionJob, announce: Callable[[str], None]) -> AdderConfig:
    """Return the configuration with the terms of each layer that the policy chooses."""
    from ...convert.calibration.hybrid import MOST_CHOSEN_TERMS, choose_terms
    from ...convert.conversion.rewrite import convert_
    from ...convert.cost.cost import cost
    from ..runs.progress import calibration_progress

    assert job.terms is not None
    assert job.images is not None

    def additions_of(config: AdderConfig) -> int:
        student = copy.deepcopy(model)
        convert_(student, config, to=job.to)
        return cost(student).additions

    announce(f"choosing terms by fits of each layer with 1 to {MOST_CHOSEN_TERMS}, on {job.images}")
    single = additions_of(dataclasses.replace(job.config, terms=1))
    images = job.images.load(model)
    with calibration_progress() as progress:
        chosen = choose_terms(model, job.config, images, single, job.terms, job.calibration, progress=progress)
    announce(f"{additions_of(chosen) / single:.1%} of the additions with one term in each layer")
    return chosen


def _calibrate(
    student: "nn.Module",
    teacher: "nn.Module",
    chosen: UnlabeledImages,
    done: "ConversionPlan",
    job: ConversionJob,
    announce: Callable[[str], None],
) -> "tuple[ConversionPlan, CalibrationReport]":
    """Calibrate the student, and return the layers that the hybrid policy chooses to convolutions.

    The policy judges layers by their own fit. If it acts, the joint fit of the layers that remain follows its choice.
    """
    from ...convert.calibration.calibrate import calibrate_
    from ...convert.calibration.hybrid import keep_convolutions_, kept_plan, layers_to_keep
    from ...convert.cost.cost import cost
    from ..runs.progress import calibration_progress

    config = job.calibration
    images = chosen.load(student)
    with calibration_progress() as progress:
        report = calibrate_(
            student,
            teacher,
            images,
            dataclasses.replace(config, matching_steps=0) if job.hybrid.acts else config,
            state=job.folder / ".calibration",  # inside, since the folder's parent may not be writable
            progress=progress,
        )
        if not job.hybrid.acts:
            return done, report
        kept = layers_to_keep(done, report, cost(teacher).multiplications, cost(student).multiplications, job.hybrid)
        announce(f"{len(kept)} of {len(report.layers)} layers return to convolutions")
        keep_convolutions_(student, teacher, kept, images, config, progress=progress)
    return kept_plan(done, kept), dataclasses.replace(report, config=config)


def _report(
    job: ConversionJob, model: "nn.Module", plan: "ConversionPlan", calibration: "CalibrationReport | None"
) -> "Report":
    from ..runs.provenance import command_line, facts_of_images, weights_origin

    before = job.source.report()
    return before.after(
        "convert",
        command_line(),
        plan=plan.to_dict(),
        calibration=calibration.to_dict() if calibration else {},
        data=facts_of_images(job.images, before),
        source=weights_origin(job.source, model),
    )
