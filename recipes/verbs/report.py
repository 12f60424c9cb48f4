"""``adderkit report``: write an HTML page about a saved model."""

from typing import Annotated

import typer

from ..configs.recipe import Recipe
from ..terminal.options import (
    ClassMap,
    DataDir,
    Dataset,
    Device,
    Json,
    Overwrite,
    Teacher,
    TeacherCheckpoint,
    ValSplit,
    check_teacher,
    output_option,
)
from ..terminal.output import announce, print_json


def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Saved folder, such as runs/mine/best.")],
    output: Annotated[str | None, output_option("FILE", "FOLDER-report.html", "HTML file to write.")] = None,
    overwrite: Overwrite = False,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    val_split: ValSplit = None,
    class_map: ClassMap = None,
    teacher: Teacher = None,
    teacher_checkpoint: TeacherCheckpoint = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write an HTML page about a saved model.

    With --dataset, it also shows predictions for a few images.
    """
    from ...convert.model_source import ModelSource
    from ..reporting.report import ReportJob, run_report
    from ..runs.provenance import DataChoice, default_data

    check_teacher(teacher, teacher_checkpoint)
    given = DataChoice(dataset, data_dir, val_split=val_split, class_map=class_map)
    chosen = default_data(ModelSource(folder), given, announce, needed=False)
    data = Recipe().changed(chosen.given()) if chosen.dataset is not None else None
    job = ReportJob(folder, output, data, teacher, teacher_checkpoint, overwrite, device)
    result = run_report(job, announce)
    if json:
        print_json(result.to_dict())
    else:
        print(result.summary())
