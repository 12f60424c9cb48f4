"""Progress on standard error: a bar on a terminal, plain lines elsewhere; standard output stays for results."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Counts steps of one piece of work, with a status text such as loss and images per second.

    Args:
        title: What is being done.
        total: Number of steps.
        enabled: Off on every process but the first.
        log_interval: Steps between lines where there is no terminal; 0 means only the last.
        note: Also gets these lines, on a terminal too.
    """

    def __init__(
        self,
        title: str,
        total: int,
        enabled: bool = True,
        log_interval: int = 0,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.log_interval = log_interval
        self.note = note
        self.console = Console(stderr=True, quiet=not enabled)
        self.started = time.perf_counter()
        self._shown = 0.0
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
        """One step further, or as far as ``done``.

        Args:
            status: Gives the text to show; called only when it is shown, since reading a loss waits for the device.
            done: Steps done in all.
        """
        self.done = self.done + 1 if done is None else done
        if self.live:
            self._bar.update(self._task, completed=self.done)
            if self.done == self.total or time.perf_counter() - self._shown > 0.2:
                self._shown = time.perf_counter()
                self._bar.update(self._task, status=status())
        due = self.done == self.total or (self.log_interval and self.done % self.log_interval == 0)
        if due and (self.note is not None or not self.live):
            seconds = time.perf_counter() - self.started
            share = 100 * self.done // max(1, self.total)
            line = f"{self.title} [{self.done}/{self.total} ({share}%)] {seconds:.1f}s {status()}".rstrip()
            if self.note is not None:
                self.note(line)
            if not self.live:
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def calibration_progress() -> Iterator["CalibrationProgress"]:
    """A bar for ``calibrate_``'s callback."""
    progress = CalibrationProgress()
    try:
        yield progress
    finally:
        progress.close()


class CalibrationProgress:
    """Turns ``(what, done, total)`` into two bars: the layers one by one, then the steps of all together."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done, ``what`` being next."""
        title = "fitting all layers together" if what == "all layers" else "fitting layers"
        if self._bar is None or self._bar.title != title:
            self.close()
            self._bar = ProgressBar(title, total).__enter__()
        self._bar.step(lambda: "" if what in ("layers", "all layers") else what, done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
