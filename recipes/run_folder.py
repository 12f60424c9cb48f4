"""What a run leaves behind: ``args.yaml``, ``summary.csv``, ``last/``, ``best/`` and the curves as a picture.

``last/`` and ``best/`` are checkpoints that ``adderkit.load`` reads. ``last/state`` holds what resuming needs besides:
accelerate's state (optimizer, sampler, random numbers) and the rows so far. A folder is written beside its place and
moved into it, so a kill leaves the old one or the new one.
"""

import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from torch import nn

from ..convert.checkpoint import save
from ..convert.errors import RecipeError
from ..convert.files import atomic_path, read_json_object, recover_folder, replace_folder, write_json, write_text
from .recipe import Recipe, parse_yaml, read_text

COLUMNS = ("epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")  # as timm's summary.csv
Row = dict[str, float]


class RunFolder:
    """The folder of one run.

    Args:
        path: Where it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last"
        self.best = self.path / "best"

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin a new run: write ``args.yaml``.

        Raises:
            RecipeError: The folder holds a run already, or cannot be written.
        """
        if (self.path / "args.yaml").exists():
            raise RecipeError(
                f"{self.path} holds a run already; continue it with --resume {self.path}, or give another --output"
            )
        try:
            write_text(self.path / "args.yaml", yaml.safe_dump(arguments, sort_keys=False))
        except OSError as error:
            raise RecipeError(f"--output {self.path} cannot be written: {error.strerror or error}") from error

    def arguments(self) -> dict[str, Any]:
        """What ``args.yaml`` says; a folder that a kill left half-moved is put right first.

        Raises:
            RecipeError: There is no run here.
        """
        for folder in (self.last, self.best):
            recover_folder(folder)
        path = self.path / "args.yaml"
        if not path.is_file():
            raise RecipeError(f"{self.path} holds no run to resume: {path} does not exist")
        return parse_yaml(read_text(path), str(path))

    def save_last(
        self, model: nn.Module, accelerator: Accelerator, rows: Sequence[Row], report: dict[str, Any]
    ) -> None:
        """Save the checkpoint and everything that resuming needs; called on every process after an epoch."""
        partial = self._partial("last")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            save(model, partial, report)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial / "state"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(partial / "state" / "rows.json", {"rows": list(rows)})
            replace_folder(self.last, partial)
            partial.parent.rmdir()
        accelerator.wait_for_everyone()

    def load_last(self, accelerator: Accelerator) -> list[Row]:
        """Restore the state that ``save_last`` wrote and return the rows so far; none where no epoch was finished.

        Raises:
            RecipeError: The state is damaged.
        """
        state = self.last / "state"
        if not state.is_dir():
            return []
        rows = read_json_object(state / "rows.json").get("rows")
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise RecipeError(f"{state / 'rows.json'} is damaged: expected rows of {', '.join(COLUMNS)}")
        try:
            accelerator.load_state(str(state))
        except Exception as error:  # whatever torch and safetensors make of a damaged file
            raise RecipeError(f"{state} is damaged: {error}; start again from {self.best}") from error
        return rows

    def save_best(self, model: nn.Module, report: dict[str, Any]) -> None:
        """Keep the model as the best so far."""
        partial = self._partial("best")
        shutil.rmtree(partial, ignore_errors=True)
        save(model, partial, report)
        replace_folder(self.best, partial)
        partial.parent.rmdir()

    def _partial(self, name: str) -> Path:
        """Where a folder is built; it has its final name, since the model card gives it."""
        return self.path / ".partial" / name

    def write_summary(self, rows: Sequence[Row]) -> None:
        """Write ``summary.csv`` and ``curves.png`` anew from all rows."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "summary.csv", buffer.getvalue())
        draw_curves(rows, self.path / "curves.png")


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and set(row) == set(COLUMNS) and all(type(row[key]) in (int, float) for key in row)


def draw_curves(rows: Sequence[Row], target: Path) -> None:
    """Loss, accuracy and learning rate against epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss", {"train_loss": "training", "eval_loss": "validation"}),
        ("accuracy (%)", {"eval_top1": "top-1", "eval_top5": "top-5"}),
        ("learning rate", {"lr": ""}),
    )
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels, strict=True):
        for column, label in lines.items():
            axes.plot(epochs, [row[column] for row in rows], marker="o", markersize=3, label=label)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def new_run_folder(output: str | None, model: str, recipe: Recipe) -> RunFolder:
    """The folder that was asked for, or ``runs/<time>-<model>-<data set>``, as timm names its own."""
    if output is not None:
        return RunFolder(output)
    from datetime import datetime

    name = "".join(sign if sign.isalnum() else "_" for sign in f"{Path(model).name}-{recipe.dataset}")
    return RunFolder(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}")
