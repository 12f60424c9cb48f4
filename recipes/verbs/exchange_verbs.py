"""``adderkit import-checkpoint`` and ``adderkit export``: models from other programs, and for them."""

from typing import Annotated

import typer

from ..terminal.options import DataDir, Dataset, Json, NumClasses, print_json

exchange_app = typer.Typer()


@exchange_app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[str, typer.Argument(help="State dict saved by PyTorch, or safetensors.")],
    model: Annotated[str, typer.Option(help="timm name of the same network, such as resnet50 or cifar_resnet20.")],
    num_classes: NumClasses = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write; default MODEL-adder.")] = None,
    json: Json = False,
) -> None:
    """Import a checkpoint of AdderNet's published code."""
    from .exchange import run_import

    done = run_import(file, model, num_classes, output)
    if json:
        print_json(done.to_dict())
    else:
        print(done.summary())


@exchange_app.command("export")
def export(
    model: Annotated[str, typer.Argument(help="Saved folder, or a timm name.")],
    form: Annotated[str, typer.Option("--format", help="onnx, torch-export, c or hex.")] = "onnx",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Default: MODEL.onnx, .pt2, -c or -hex.")] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; default 18.")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Write a model as ONNX or torch.export program; quantized, also as C99 or .hex files that record images."""
    from .exchange import ExportJob, run_export

    done = run_export(ExportJob(model, form, output, opset, dataset, data_dir))
    if json:
        print_json(done.to_dict())
    else:
        print(done.summary())
