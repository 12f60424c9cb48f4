"""What a run tells while it goes: lines in ``log.txt``, numbers for trackers, tables and pictures in its folder."""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from accelerate import Accelerator

from ..training.assemble import Run
from .folder import RunFolder
from .layer_scales import watched_layers
from .plan import RunPlan, device_name
from .plots import draw_plots
from .signals import Interrupted
from .state import RunState
from .trackers import end_trackers, start_trackers

_SECONDS_BETWEEN_PLOTS = 60.0


class Journal:
    """The journal of one run; every method may be called on every process, and acts on the first.

    Args:
        run: What is trained.
        folder: Where it is kept.
    """

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run = run
        self.folder = folder
        self.accelerator: Accelerator = run.accelerator
        self.layers = list(watched_layers(run.bare_model))
        self._log: TextIO | None = None
        self._drawn = time.monotonic()

    def open(self, position: RunState) -> None:
        """Begin, or go on at a position: what was to follow the save that is resumed is made up for."""
        if not self.accelerator.is_main_process:
            return
        self._log = _open_log(self.folder.path / "log.txt")
        if position.rows:
            self.write_tables(position)  # a kill may have come between the save and the tables
        step, arguments = self.run.steps_done(position), self.folder.arguments()
        for line in self._plan(arguments["job"]) if step == 0 else [f"resumed behind step {step}"]:
            self.note(line)
        start_trackers(self.accelerator, self.run.recipe, self.folder.path, arguments, step)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, Interrupted):
            self.note("stopped as asked, saved")
        elif value is not None:
            self.note(f"ended by {type(value).__name__}: {' '.join(str(value).split())}".removesuffix(": "))
        if self.accelerator.is_main_process:
            end_trackers(self.accelerator)
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, line: str) -> None:
        """A line on standard error and in ``log.txt``."""
        if self.accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        """A line in ``log.txt`` alone, with the time; a disk that is full does not end the run here."""
        if self._log is None:
            return
        try:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=self._log, flush=True)
        except OSError as error:
            print(f"{self._log.name} goes on no more: {error.strerror or error}", file=sys.stderr, flush=True)
            self._log = None

    def step(self, position: RunState, images_per_second: float, *, skipped: bool) -> None:
        """After an optimizer step: the trackers get numbers every ``log_interval`` steps.

        Args:
            position: Behind the step.
            images_per_second: Of the epoch so far, all processes together.
            skipped: Whether the step was, since loss or gradient was not finite.
        """
        self.run.images_per_second = images_per_second
        step = self.run.steps_done(position)
        if skipped:
            self.note(f"step {step} skipped, loss or gradient is not finite; {position.skipped} skipped in all")
        if step % self.run.recipe.log_interval == 0 and position.images:
            values = {
                "train/loss": position.loss / position.images,
                "train/lr": position.lr,
                "train/images_per_second": images_per_second,
                "train/skipped_steps": position.skipped,
            }
            self._track(values, step)

    def epoch(self, position: RunState) -> None:
        """After an epoch, before it is saved: its row and its layers' scales for the trackers.

        Before, since a run that is resumed before this save logs the epoch again, and one resumed behind it does not.
        """
        row = {f"epoch/{column}": value for column, value in position.rows[-1].items()}
        for sample in position.scales[-1:]:
            for name in ("weight_rms", "gradient_norm"):
                row |= {f"{name}/{layer}": value for layer, value in zip(self.layers, sample[name], strict=True)}
        self._track(row, self.run.steps_done(position))

    def write_tables(self, position: RunState) -> None:
        """After a save: ``summary.csv`` and ``layers.csv`` anew; ``plots/`` once a minute, and at the run's end."""
        if not self.accelerator.is_main_process:
            return
        self.folder.write_summary(position.rows)
        self.folder.write_layers(self.layers, position.scales)
        if position.epoch == self.run.recipe.epochs or time.monotonic() - self._drawn > _SECONDS_BETWEEN_PLOTS:
            self._drawn = time.monotonic()
            draw_plots(position.rows, self.layers, position.scales, self.folder.path / "plots")

    def _plan(self, job: dict[str, Any]) -> list[str]:
        """What is begun, and with what."""
        run = self.run
        train_set: Any = run.train_loader.dataset
        eval_set: Any = run.eval_loader.dataset
        plan = RunPlan.of(
            run.bare_model,
            model=job["source"]["name"],
            teacher=job["teacher"],
            recipe=run.recipe,
            processes=self.accelerator.num_processes,
            images=getattr(train_set, "images", len(train_set)),
            evaluation_images=len(eval_set),
            steps_per_epoch=run.updates_per_epoch,
        )
        used = ", ".join(f"{name} {version(name)}" for name in ("adderkit", "torch", "timm", "accelerate"))
        device = f"{self.accelerator.num_processes} x {device_name(self.accelerator.device)}"
        return [f"{used} on {device}", *(f"{title}: {text}" for title, text in plan.lines().items())]

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.log(values, step=step)


def _open_log(path: Path) -> TextIO:
    """The log to go on with, behind a line break where a kill cut the last line off."""
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    log = path.open("a", encoding="utf-8")
    if cut:
        log.write("\n")
    return log
