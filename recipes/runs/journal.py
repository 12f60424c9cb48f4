"""Logging of a run: lines in ``log.txt``, numbers for trackers, tables and plots in its folder."""

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TextIO

from accelerate import Accelerator

from .folder import RunFolder
from .plan import RunPlan, device_name
from .plots import draw_plots
from .signals import Interrupted
from .state import RunState
from .trackers import end_trackers, start_trackers

_SECONDS_BETWEEN_PLOTS = 60.0


class Journal:
    """The log of one run; every method may be called on every process, and acts on the first.

    It only reads the run's state.

    Args:
        accelerator: The accelerator of the run, with its trackers.
        plan: The run in figures, with its recipe.
        folder: The folder of the run.
        layers: Names of the layers whose scales are sampled.
    """

    def __init__(self, accelerator: Accelerator, plan: RunPlan, folder: RunFolder, layers: Sequence[str]) -> None:
        self.accelerator = accelerator
        self.plan = plan
        self.folder = folder
        self.layers = list(layers)
        self.seconds_between_epochs = 0.0  # of the last evaluation and save
        self._log: TextIO | None = None
        self._drawn = time.monotonic()

    def open(self, state: RunState, step: int) -> None:
        """Begin the log or continue it.

        Args:
            state: The state that the run begins with, or was resumed at.
            step: Optimizer steps done.
        """
        if not self.accelerator.is_main_process:
            return
        self._log = _open_log(self.folder.path / "log.txt")
        if state.rows:
            self.write_tables(state)  # a kill may have come between the save and the tables
        for line in self._plan_lines() if step == 0 else [f"resumed after step {step}"]:
            self.note(line)
        start_trackers(self.accelerator, self.plan.recipe, self.folder.path, self.folder.arguments(), step)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(value, Interrupted):
            self.note("stopped on request, saved")
        elif value is not None:
            self.note(f"ended by {type(value).__name__}: {' '.join(str(value).split())}".removesuffix(": "))
        if self.accelerator.is_main_process:
            end_trackers(self.accelerator)
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, line: str) -> None:
        """Write a line to standard error and to ``log.txt``."""
        if self.accelerator.is_main_process:
            print(line, file=sys.stderr, flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        """Write a line to ``log.txt`` alone, with the time; a full disk does not end the run here."""
        if self._log is None:
            return
        try:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=self._log, flush=True)
        except OSError as error:
            print(f"cannot write to {self._log.name} any more: {error.strerror or error}", file=sys.stderr, flush=True)
            self._log = None

    def step(self, state: RunState, step: int, *, skipped: bool) -> None:
        """Log an optimizer step; the trackers get numbers every ``log_interval`` steps.

        Args:
            state: The state after the step.
            step: Optimizer steps done.
            skipped: The step was skipped, since loss or gradient was not finite.
        """
        if skipped:
            self.note(f"step {step} skipped, loss or gradient is not finite; {state.skipped} skipped in all")
        if step % self.plan.recipe.log_interval == 0 and state.images:
            values = {f"train/{name}": value for name, value in state.mean_losses().items()}
            values |= {"train/lr": state.lr, "train/skipped_steps": state.skipped}
            if state.images_per_second is not None:
                values["train/images_per_second"] = state.images_per_second
            self._track(values, step)

    def epoch(self, state: RunState, step: int) -> None:
        """Log an epoch before it is saved: its row and its layers' scales for the trackers.

        Before, since a run that is resumed before this save logs the epoch again, and one resumed after it does not.

        Args:
            state: The state after the epoch.
            step: Optimizer steps done.
        """
        row = {f"epoch/{column}": value for column, value in state.rows[-1].items()}
        for sample in state.layer_scales[-1:]:
            for name in ("weight_rms", "gradient_norm"):
                row |= {f"{name}/{layer}": value for layer, value in zip(self.layers, sample[name], strict=True)}
        self._track(row, step)

    def write_tables(self, state: RunState) -> None:
        """Rewrite ``summary.csv`` and ``layers.csv`` after a save; ``plots/`` once a minute and at the run's end."""
        if not self.accelerator.is_main_process:
            return
        self.folder.write_summary(state.rows)
        self.folder.write_layers(self.layers, state.layer_scales)
        if state.epoch == self.plan.recipe.epochs or time.monotonic() - self._drawn > _SECONDS_BETWEEN_PLOTS:
            self._drawn = time.monotonic()
            draw_plots(state.rows, self.layers, state.layer_scales, self.folder.path / "plots")

    def _plan_lines(self) -> list[str]:
        """Lines for a new run: the versions of packages, the device and the plan."""
        used = ", ".join(f"{name} {version(name)}" for name in ("adderkit", "torch", "timm", "accelerate"))
        device = f"{self.accelerator.num_processes} x {device_name(self.accelerator.device)}"
        return [f"{used} on {device}", *(f"{title}: {text}" for title, text in self.plan.lines().items())]

    def _track(self, values: dict[str, float], step: int) -> None:
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.log(values, step=step)


def _open_log(path: Path) -> TextIO:
    """Open the log to append to it, after a line break where a kill cut the last line off."""
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    log = path.open("a", encoding="utf-8")
    if cut:
        log.write("\n")
    return log
