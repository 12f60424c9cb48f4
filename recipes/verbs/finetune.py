"""``adderkit finetune``: fine-tune a converted model, or train a CNN; begin a run or resume one."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal.options import Checkpoint, DataDir, Dataset, InChans, Json, NumClasses, Pretrained
from ..terminal.output import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from ...convert.model_source import ModelSource
    from ..configs.recipe import Recipe
    from ..runs.folder import RunFolder
    from ..runs.state import Row
    from ..training.models import Job


def finetune(
    model: Annotated[str | None, typer.Argument(help="Converted folder, or a timm model name to train a CNN.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Shipped recipe, or YAML file.", show_default="distill or cnn"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key.")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Images per process and forward pass.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed for weights, order and augmentation.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=0, help="Number of data loader processes.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(min=0, help="Steps between saves within an epoch.")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="CNN to distill from.", show_default="the converted one")
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="DIR", help="Run folder to write.", show_default="runs/TIME-MODEL"),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="DIR", help="Run folder to resume; excludes all else.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Processes to start, one per GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, steps and memory; write nothing.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune a converted model by distillation, or train a CNN."""
    if (model is None) == (resume is None):
        raise typer.BadParameter("give either a model to begin with, or --resume RUN_DIR", param_hint="MODEL")
    if num_processes is not None and num_processes > 1 and not dry_run:
        from ..distributed.launch import launch

        sys.exit(launch(sys.argv[1:], num_processes))
    flags: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "epochs": epochs, "batch_size": batch_size}
    flags |= {"lr": lr, "seed": seed, "workers": workers, "save_every": save_every}
    given = {key: value for key, value in flags.items() if value is not None}
    if model is None:
        others = (dry_run, given, recipe, set_, teacher, checkpoint, output, not pretrained, num_classes, in_chans)
        if any(others):
            raise typer.BadParameter("a run continues as it was begun; give no other option", param_hint="--resume")
        folder, rows = _resume(str(resume))
    else:
        from ...convert.model_source import ModelSource
        from ..training.models import Job

        source = ModelSource(model, pretrained, checkpoint, num_classes, in_chans)
        job = Job(source, teacher)
        settings = _settings(source, recipe, given, set_ or ())
        if dry_run:
            _print_plan(job, settings, num_processes or 1, json)
            return
        folder, rows = _start(job, settings, output)
    _print_result(folder, rows, json)


def _settings(source: "ModelSource", recipe: str | None, given: Mapping[str, Any], changes: Sequence[str]) -> "Recipe":
    """Return the recipe with the settings of the command line: first the options, then each ``--set``."""
    from ..configs.files import load_recipe, parse_settings
    from ..training.models import default_recipe

    return load_recipe(recipe or default_recipe(source)).changed({**given, **parse_settings(changes)})


def _start(job: "Job", settings: "Recipe", output: str | None) -> "tuple[RunFolder, list[Row]]":
    from ..runs.folder import new_run_folder
    from ..training import run
    from ..training.recovery import run_with_recovery

    folder = new_run_folder(output, job.source.name, settings)
    return folder, run_with_recovery(partial(run.start, job, settings, folder), folder)


def _resume(path: str) -> "tuple[RunFolder, list[Row]]":
    from ..runs.folder import RunFolder
    from ..training import run
    from ..training.recovery import run_with_recovery

    folder = RunFolder(path)
    return folder, run_with_recovery(partial(run.resume, folder), folder)


def _print_plan(job: "Job", settings: "Recipe", processes: int, json: bool) -> None:
    from ..training.dry_run import dry_run

    planned = dry_run(job, settings, processes)
    print_json(planned.to_dict()) if json else print(planned.text(), end="")


def _print_result(folder: "RunFolder", rows: "Sequence[Row]", json: bool) -> None:
    """Print the summary of a finished run, in its main process only."""
    from ..terminal.tables import show
    from ..training.run import is_main_process

    if not is_main_process():
        return
    if json:
        print_json({"output": str(folder.path), "rows": list(rows)})
        return
    show(summary_table(rows))
    print(f"best model: {folder.best}")


def summary_table(rows: "Sequence[Row]") -> "Table":
    """Table of the rows of a run's ``summary.csv``."""
    from ..terminal.tables import new_table

    table = new_table("run summary", (), (column.replace("_", " ") for column in (rows[0] if rows else ())))
    for row in rows:
        table.add_row(*(str(value) if key == "epoch" else f"{value:.4g}" for key, value in row.items()))
    return table
