"""``adderkit demo``: the whole workflow on a small real data set, in minutes on two cores."""

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..terminal.options import Json, Overwrite, output_option
from ..terminal.output import announce, print_json

if TYPE_CHECKING:
    from ..training.evaluate import Metrics

MODEL = "cifar_resnet20"
DATASET = "digits"
CALIBRATION_IMAGES = 512
_PARTS = ("teacher", "converted", "student", "final")
_SETTINGS = {"dataset": DATASET, "batch_size": 64, "hflip": 0.0, "crop_padding": 1, "workers": 0}


def demo(
    output: Annotated[str | None, output_option("DIR", "a temporary one")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run the whole workflow on scikit-learn's digits.

    Trains a CNN, converts, calibrates, fine-tunes, saves, reloads and evaluates it.
    """
    from ..terminal.tables import metrics_table, show

    rows = run_demo(output, announce, overwrite=overwrite)
    if json:
        print_json({"rows": [{"model": row.model, **row.metrics.to_dict()} for row in rows]})
    else:
        show(metrics_table([(row.model, row.metrics) for row in rows]))


@dataclasses.dataclass(frozen=True)
class DemoRow:
    """One row of the demo's result."""

    model: str
    metrics: "Metrics"


def run_demo(output: str | None, announce: Callable[[str], None], *, overwrite: bool = False) -> list[DemoRow]:
    """Train a CNN teacher on scikit-learn's digits, convert, calibrate, fine-tune, save, reload and evaluate.

    Args:
        output: Folder for the results; by default a temporary one that is removed.
        announce: Called with a line before each step.
        overwrite: Replace an earlier demo in the folder.

    Returns:
        Rows for the teacher and for the adder network after calibration, fine-tuning and reloading.

    Raises:
        AdderkitError: The folder is taken, or is not writable.
    """
    from ...convert.output import FolderKind, output_folder

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output or scratch)
        with output_folder(folder, FolderKind("a demo", _is_demo), overwrite=overwrite):
            for part in reversed(_PARTS):  # the one by which a demo is recognized comes last
                shutil.rmtree(folder / part, ignore_errors=True)
            return _run(folder, announce)


def _is_demo(folder: Path) -> bool:
    return (folder / "teacher" / "args.yaml").is_file() and {path.name for path in folder.iterdir()} <= {*_PARTS}


def _run(folder: Path, announce: Callable[[str], None]) -> list[DemoRow]:
    from ...convert.calibration.calibrate import calibrate_
    from ...convert.calibration.config import CalibrationConfig
    from ...convert.checkpoint.folder import load, save
    from ...convert.checkpoint.report import read_report
    from ...convert.conversion.rewrite import convert_
    from ...convert.model_source import ModelSource
    from ..configs.files import load_recipe
    from ..data.loaders import unlabeled_images
    from ..distributed.device import compute_device
    from ..runs.folder import RunFolder
    from ..runs.kept_teacher import KeptTeacher
    from ..runs.progress import calibration_progress
    from ..runs.provenance import command_line, weights_origin
    from ..training.models import Job
    from ..training.run import start
    from .evaluate import evaluate_split

    announce(f"1/5  train a CNN teacher: {MODEL} on {DATASET}")
    recipe = load_recipe("cnn").changed({**_SETTINGS, "epochs": 12})
    start(Job(ModelSource(MODEL, pretrained=False)), recipe, RunFolder(folder / "teacher"))
    teacher = load(folder / "teacher" / "best")

    announce(f"2/5  convert it and calibrate on {CALIBRATION_IMAGES} images without labels")
    student = copy.deepcopy(teacher)
    plan = convert_(student)
    config = CalibrationConfig(steps=60, samples=4096)
    images = unlabeled_images(DATASET, None, student, CALIBRATION_IMAGES)
    with calibration_progress() as progress, compute_device(None) as device:
        fidelity = calibrate_(student.to(device), teacher.to(device), images, config, progress=progress)
    original = ModelSource(str(folder / "teacher" / "best"))
    report = original.report().after(
        "convert",
        command_line(),
        plan=plan.to_dict(),
        calibration=fidelity.to_dict(),
        source=weights_origin(original, teacher),
    )
    KeptTeacher.of_cnn(original, teacher).save_with(student, folder / "converted", report)

    announce("3/5  fine-tune it by distillation from the teacher")
    distill = load_recipe("distill").changed({**_SETTINGS, "epochs": 3})
    start(Job(ModelSource(str(folder / "converted"))), distill, RunFolder(folder / "student"))
    tuned = load(folder / "student" / "best")

    announce("4/5  save and reload it")
    save(tuned, folder / "final", read_report(folder / "student" / "best"))
    reloaded = load(folder / "final")

    announce("5/5  evaluate")
    models = {
        "CNN teacher": teacher,
        "adder network, calibrated, before training": student,
        "adder network, fine-tuned": tuned,
        "adder network, reloaded": reloaded,
    }
    return [DemoRow(name, evaluate_split(model, recipe)) for name, model in models.items()]
