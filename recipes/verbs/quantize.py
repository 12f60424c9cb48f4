"""``adderkit quantize``: quantize a model to an integer network and save it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...convert.quantization.config import Bits, FirstLast, QuantizeConfig, Requant
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
    from rich.table import Table
    from torch import nn

    from ...convert.checkpoint.report import Report
    from ...convert.cost.report import IntegerRow
    from ...convert.model_source import ModelSource
    from ...convert.quantization.ranges import Range


BitsOption = Annotated[Bits, typer.Option(help="Bits of all layers but the first and the last.")]
Rescaling = Annotated[Requant, typer.Option(help="Rescale sums by multiplying and shifting, or by shifts alone.")]
Ends = Annotated[FirstLast, typer.Option(help="Format of the first convolution and the classifier.")]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Saved folder or timm model name.")],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    train_split: TrainSplit = None,
    bits: BitsOption = QuantizeConfig.bits,
    requant: Rescaling = QuantizeConfig.requant,
    first_last: Ends = QuantizeConfig.first_last,
    calibration_images: CalibrationImages = UnlabeledImages.count,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the choice of images.")] = UnlabeledImages.seed,
    output: Annotated[str | None, output_option("DIR", "MODEL-intBITS")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print ranges and step sizes without writing anything.")
    ] = False,
    json: Json = False,
) -> None:
    """Quantize a model to an integer network.

    Ranges of activations are measured on unlabeled training images of --dataset.
    """
    from ...convert.model_source import ModelSource
    from ..runs.provenance import DataChoice, default_data
    from ..terminal.tables import integer_table, show

    source = ModelSource(model, pretrained, checkpoint, num_classes, in_chans)
    data = default_data(source, DataChoice(dataset, data_dir, train_split), announce)
    job = QuantizationJob(
        source=source,
        config=QuantizeConfig(bits, requant, first_last),
        output=output,
        images=unlabeled_images(data.dataset, data.data_dir, data.train_split, calibration_images, seed),
        overwrite=overwrite,
        device=device,
    )
    result = run_quantization(job, dry_run=dry_run, announce=announce)
    if json:
        print_json(result.to_dict())
        return
    if result.ranges:
        show(range_table(result.ranges))
    show(integer_table(result.steps))
    print(result.summary())


@dataclasses.dataclass(frozen=True)
class QuantizationJob:
    """Model to quantize, and how.

    Args:
        source: Model to quantize.
        config: Widths and formats of the integer network.
        output: Folder to write; by default ``<model>-int<bits>`` in the current folder.
        images: Images to measure ranges on.
        overwrite: Replace a saved model in the folder.
        device: Device to compute on; by default the GPU, if there is one.
    """

    source: "ModelSource"
    config: QuantizeConfig
    output: str | None = None
    images: UnlabeledImages | None = None
    overwrite: bool = False
    device: str | None = None

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.source.default_output(f"-int{self.config.bits}") if self.output is None else Path(self.output)


@dataclasses.dataclass(frozen=True)
class QuantizationResult:
    """Outcome of quantization; ``folder`` is ``None`` after a dry run."""

    config: QuantizeConfig
    steps: "tuple[IntegerRow, ...]"
    ranges: "tuple[Range, ...]"
    images: int
    bytes_before: int
    bytes_after: int
    folder: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        known = {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}
        return {**known, "output": str(self.folder) if self.folder else None}

    def summary(self) -> str:
        """Return a one-line summary."""
        sizes = f"weights {self.bytes_before / 1e3:,.0f} kB before, {self.bytes_after / 1e3:,.0f} kB after"
        if self.folder is None:
            return f"{len(self.steps)} integer steps; {sizes}; nothing was written (--dry-run)"
        images = f"ranges measured on {self.images} images"
        return f"{len(self.steps)} integer steps; {sizes}; {images}; saved in {self.folder}/"


def run_quantization(job: QuantizationJob, *, dry_run: bool, announce: Callable[[str], None]) -> QuantizationResult:
    """Quantize a model and save it.

    Args:
        job: Model to quantize, and how.
        dry_run: Do everything but write.
        announce: Called with a line before each slow step.

    Raises:
        AdderkitError: The model, its weights or the data cannot be loaded, or integers cannot express the model.
    """
    from ...convert.checkpoint.report import MODEL_FOLDER
    from ...convert.errors import ModelSourceError
    from ...convert.output import output_folder

    job.source.refuse_target(job.folder)
    if job.images is None:
        raise ModelSourceError("ranges are measured on unlabeled images: give --dataset")
    if dry_run:
        return _quantize(job, job.images, None, announce)
    with output_folder(job.folder, MODEL_FOLDER, overwrite=job.overwrite):
        return _quantize(job, job.images, job.folder, announce)


def _quantize(
    job: QuantizationJob, chosen: UnlabeledImages, folder: Path | None, announce: Callable[[str], None]
) -> QuantizationResult:
    from ...convert.checkpoint.configuration import check_savable
    from ...convert.cost.integer import integer_rows
    from ...convert.quantization.quantize import quantize_with_ranges, require_logits
    from ..distributed.device import compute_device
    from ..runs.kept_teacher import KeptTeacher

    with compute_device(job.device) as device:
        model = job.source.build().to(device)
        check_savable(model)
        require_logits(model)  # before the images are read
        images = chosen.load(model)
        announce(f"quantizing {job.source.name} on {len(images)} unlabeled images of {chosen.dataset}")
        network, ranges = quantize_with_ranges(model, images, job.config)
    sizes = [sum(each.numel() * each.element_size() for each in net.state_dict().values()) for net in (model, network)]
    if folder is not None:
        teacher = KeptTeacher.of_successor(job.source, model)
        teacher.save_with(network, folder, _report(job, model, len(images), ranges))
    return QuantizationResult(
        job.config, tuple(integer_rows(network.plan)), tuple(ranges), len(images), sizes[0], sizes[1], folder
    )


def _report(job: QuantizationJob, model: "nn.Module", images: int, ranges: "Sequence[Range]") -> "Report":
    from ..runs.provenance import command_line, facts_of_images, weights_origin

    rows = [dataclasses.asdict(each) for each in ranges]
    before = job.source.report()
    return before.after(
        "quantize",
        command_line(),
        quantization={"config": job.config.to_dict(), "images": images, "ranges": rows},
        data=facts_of_images(job.images, before),
        source=weights_origin(job.source, model),
    )


def range_table(ranges: "Sequence[Range]") -> "Table":
    """Table of the ranges that were chosen for the activations."""
    from rich.markup import escape

    from ..terminal.tables import new_table

    table = new_table("activation ranges", ("layer", "rule"), ("bits", "min", "max", "variance lost"))
    for row in ranges:
        cells = (str(row.bits), f"{row.low:.3g}", f"{row.high:.3g}", f"{100 * row.error:.2f} %")
        table.add_row(escape(row.path) or "(image)", row.rule, *cells)
    return table
