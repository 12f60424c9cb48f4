"""Progress on standard error: a bar on a terminal, plain lines elsewhere; standard output is for results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """Progress of one task, with a status text such as loss and images per second.

    Args:
        title: Name of the task.
        total: Number of steps.
        enabled: Whether to print; only on the first process.
        log_interval: Steps between lines where there is no terminal; 0 means one every half minute, and the last.
        note: Called with each of these lines, on a terminal too.
        rest: Returns the seconds of a run after this task, given those of a step.
        start: Steps done before, in no time; by default, all but one of those done after the first step.
    """

    def __init__(
        self,
        title: str,
        total: int,
        enabled: bool = True,
        log_interval: int = 0,
        note: Callable[[str], None] | None = None,
        rest: Callable[[float], float] | None = None,
        start: int | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.rest = rest
        self.log_interval = log_interval
        self.note = note
        self.console = Console(stderr=True, quiet=not enabled)
        self.started = self._written = time.perf_counter()
        self._shown = 0.0
        self._start = start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, status="")
        self.live = enabled and self.console.is_terminal

    def __enter__(self) -> "ProgressBar":
        if self.live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._bar.stop()

    def step(self, status: Callable[[], str] = str, done: int | None = None) -> None:
        """Advance by one step, or to ``done``.

        Args:
            status: Returns the text to show; called only when it is shown, since reading a loss waits for the device.
            done: Number of steps done so far.
        """
        self.done = self.done + 1 if done is None else done
        if self._start is None:
            self._start = self.done - 1
        if self.live:
            self._bar.update(self._task, completed=self.done)
            if self.done == self.total or time.perf_counter() - self._shown > 0.2:
                self._shown = time.perf_counter()
                self._bar.update(self._task, status=f"{self._time_left()} {status()}".strip())
        if self._line_is_due() and (self.note is not None or not self.live):
            self._written = time.perf_counter()
            seconds = self._written - self.started
            share = 100 * self.done // max(1, self.total)
            line = f"{self.title} [{self.done}/{self.total} ({share}%)] {seconds:.1f}s"
            line = " ".join(filter(None, (line, self._time_left(), status())))
            if self.note is not None:
                self.note(line)
            if not self.live:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line_is_due(self) -> bool:
        if self.done == self.total:
            return True
        if self.log_interval:
            return self.done % self.log_interval == 0
        return time.perf_counter() - self._written >= _SECONDS_BETWEEN_LINES

    def _time_left(self) -> str:
        """Return the time to the end of the task and of the run, at the rate so far.

        Of a task by itself, a bar shows it in a column of its own.
        """
        timed = self.done - (self._start or 0)
        if timed == 0:
            return ""
        step = (time.perf_counter() - self.started) / timed
        task = step * (self.total - self.done)
        if self.rest is None:
            return "" if self.live or self.done >= self.total else f"eta {_duration(task)}"
        return f"eta {_duration(task)}, run {_duration(task + self.rest(step))}"


def _duration(seconds: float) -> str:
    """Return a duration as ``H:MM:SS``, with days where there are any."""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def calibration_progress() -> Iterator["CalibrationProgress"]:
    """Yield a callback for ``calibrate_`` that shows its progress."""
    progress = CalibrationProgress()
    try:
        yield progress
    finally:
        progress.close()


class CalibrationProgress:
    """Callback that turns ``(what, done, total)`` into a bar, whose time left is that of the whole calibration."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done, with ``what`` next."""
        if self._bar is None or self._bar.total != total:
            self.close()
            # A joint fit by itself, after layers have returned to convolutions, counts its steps.
            title = "fitting all layers together" if what == "all layers" else "calibrating"
            self._bar = ProgressBar(title, total, start=done).__enter__()  # some may be restored
        self._bar.step(lambda: "" if what == "layers" else what, done)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
