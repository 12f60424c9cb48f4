"""``adderkit quantize`` and ``adderkit bench``: a model in integers, and how fast any model runs."""

import sys
from typing import Annotated

import typer

from ..terminal.options import Checkpoint, DataDir, Dataset, Json, Pretrained, print_json

integer_app = typer.Typer()


@integer_app.command("quantize")
def quantize(
    model: Annotated[str, typer.Argument(help="Saved folder, adder network or CNN, or a timm name.")],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    bits: Annotated[int, typer.Option(help="Of weights and activations between first and last layer: 8, 6, 5, 4.")] = 8,
    requant: Annotated[str, typer.Option(help="From sums to bytes: fixed (multiply and shift) or shift.")] = "fixed",
    first_last: Annotated[str, typer.Option(help="First convolution and classifier: int8 or fp32.")] = "int8",
    calibration_images: Annotated[int, typer.Option(min=16, help="Unlabeled images to measure on.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images.")] = 0,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-int8.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print ranges and steps; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Make an integer network of a model, on unlabeled images."""
    from ...convert.quantization.config import QuantizeConfig
    from ..terminal.tables import show
    from .quantize import QuantizationJob, quantization_tables, run_quantization

    config = QuantizeConfig(bits, requant, first_last)  # type: ignore[arg-type]  # checked by QuantizeConfig
    source = (calibration_images, seed, checkpoint, pretrained)
    job = QuantizationJob(model, config, output, dataset, data_dir, *source)
    result = run_quantization(job, dry_run=dry_run, announce=_announce)
    if json:
        print_json(result.to_dict())
        return
    for table in quantization_tables(result):
        show(table)
    print(result.summary())


@integer_app.command("bench")
def bench(
    model: Annotated[str, typer.Argument(help="Saved folder, or a timm name (built without weights).")],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images in a forward pass.")] = 1,
    profile: Annotated[bool, typer.Option("--profile", help="Each step of an integer network too.")] = False,
    json: Json = False,
) -> None:
    """Measure how long a forward pass takes on this machine's CPU."""
    from ..terminal.tables import show
    from .bench import bench_tables, run_bench

    result = run_bench(model, batch_size, profile=profile)
    if json:
        print_json(result.to_dict())
        return
    for table in bench_tables(result):
        show(table)


def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
