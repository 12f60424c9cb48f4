"""``adderkit finetune``: fine-tune a converted model, or train a CNN; begin a run or resume one."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.notices import is_first_process
from ..terminal.options import (
    Checkpoint,
    ClassMap,
    DataDir,
    Dataset,
    Device,
    InChans,
    Json,
    NumClasses,
    Pretrained,
    Teacher,
    TeacherCheckpoint,
    check_teacher,
    output_option,
)
from ..terminal.output import announce, print_json
from ..terminal.recipe_options import with_recipe_options

if TYPE_CHECKING:
    from rich.table import Table

    from ...convert.model_source import ModelSource
    from ..configs.recipe import Recipe
    from ..runs.folder import RunFolder
    from ..runs.state import Row
    from ..training.models import Job


Recipes = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="Shipped recipe or YAML file.", show_default="distill or cnn"),
]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", min=1, metavar="N", help="Images per process and forward pass.")
]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of weights, order and augmentation.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=0, metavar="N", help="Number of data loader processes.")
]
SaveEvery = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Optimizer steps between saves within an epoch.")
]
TrainSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Training split.", show_default="the recipe's: train")
]
ValSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Evaluation split.", show_default="the recipe's: validation")
]
Resume = Annotated[
    str | None, typer.Option(metavar="DIR", help="Run folder to resume; --epochs, --lr and a few more may change.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Number of processes on this machine, one per GPU.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print plan, steps and memory without writing anything.")]


@with_recipe_options
def finetune(
    settings: Mapping[str, Any],
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Converted folder, or a timm model name to train a CNN.")
    ] = None,
    recipe: Recipes = None,
    set_: Changes = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    train_split: TrainSplit = None,
    val_split: ValSplit = None,
    class_map: ClassMap = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of epochs.")] = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(metavar="LR", help="Peak learning rate.")] = None,
    seed: Seed = None,
    workers: Workers = None,
    save_every: SaveEvery = None,
    teacher: Teacher = None,
    teacher_checkpoint: TeacherCheckpoint = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    output: Annotated[str | None, output_option("DIR", "runs/TIME-MODEL", "Run folder to write.")] = None,
    resume: Resume = None,
    num_processes: Processes = None,
    device: Device = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Fine-tune a converted model, or train a CNN.

    Settings come from a recipe, which --set and the options below change; adderkit recipes lists the shipped ones.
    """
    if (model is None) == (resume is None):
        raise typer.BadParameter("give either a model to start from, or --resume DIR", param_hint="MODEL")
    flags: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir, "epochs": epochs, "batch_size": batch_size}
    flags |= {"train_split": train_split, "val_split": val_split, "class_map": class_map}
    flags |= {"lr": lr, "seed": seed, "workers": workers, "save_every": save_every}
    given = {**settings, **{key: value for key, value in flags.items() if value is not None}}
    if resume is not None:
        others = (dry_run, recipe, teacher, teacher_checkpoint, checkpoint, output, not pretrained)
        if any((*others, num_classes, in_chans)):
            raise typer.BadParameter(
                "a resumed run keeps its model, recipe and folder; give settings to change, such as --epochs, alone",
                param_hint="--resume",
            )
        _launch(num_processes, resume)
        _select_device(context, device)
        folder, rows = _resume(resume, given, set_ or ())
    else:
        from ...convert.model_source import ModelSource
        from ..training.models import Job

        if not dry_run:
            _launch(num_processes)
        source = ModelSource(str(model), pretrained, checkpoint, num_classes, in_chans)
        check_teacher(teacher, teacher_checkpoint)
        job = Job(source, teacher, teacher_checkpoint)
        changed = _settings(source, recipe, given, set_ or ())
        _select_device(context, device)
        if dry_run:
            _print_plan(job, changed, num_processes or 1, json)
            return
        folder, rows = _start(job, changed, output)
    _print_result(folder, rows, json)


def _select_device(context: typer.Context, name: str | None) -> None:
    """Select the device for the rest of the command."""
    from ..distributed.device import compute_device

    context.with_resource(compute_device(name))


def _launch(processes: int | None, resumed: str | None = None) -> None:
    """Run the command line in several processes and exit, where it asks for them or the resumed run had them."""
    from ..distributed.launch import launch, processes_of_run
    from ..distributed.worker import is_launched

    if is_launched():
        if processes is not None:
            raise typer.BadParameter(
                "another launcher has started this process, and sets their number; leave the option out",
                param_hint="--num-processes",
            )
        return
    if processes is None and resumed is not None:
        processes = processes_of_run(resumed)
        if processes > 1:
            announce(f"resuming with {processes} processes, as many as the run had; --num-processes N changes this")
    if processes is not None and processes > 1:
        sys.exit(launch(sys.argv[1:], processes))


def _settings(source: "ModelSource", recipe: str | None, given: Mapping[str, Any], changes: Sequence[str]) -> "Recipe":
    """Return the recipe with the settings of the command line: first the options, then each ``--set``."""
    from ..configs.files import load_recipe, parse_settings
    from ..runs.provenance import DataChoice, default_data
    from ..training.models import default_recipe

    settings = load_recipe(recipe or default_recipe(source)).changed({**given, **parse_settings(changes)})
    say = announce if is_first_process() else lambda line: None
    return settings.changed(default_data(source, DataChoice.of_recipe(settings), say).given())


def _start(job: "Job", settings: "Recipe", output: str | None) -> "tuple[RunFolder, list[Row]]":
    from ..runs.folder import new_run_folder
    from ..training import run
    from ..training.recovery import run_with_recovery

    folder = new_run_folder(output, job.source.name, settings)
    return folder, run_with_recovery(partial(run.start, job, settings, folder), folder)


def _resume(path: str, given: Mapping[str, Any], changes: Sequence[str]) -> "tuple[RunFolder, list[Row]]":
    from ..configs.files import parse_settings
    from ..runs.folder import RunFolder
    from ..training import run
    from ..training.recovery import run_with_recovery

    folder = RunFolder(path)
    changed = {**given, **parse_settings(changes)}
    return folder, run_with_recovery(partial(run.resume, folder, changed), folder)


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
