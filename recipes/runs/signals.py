"""Ctrl-C and SIGTERM: a run saves and ends between two optimizer steps, rather than wherever it happens to be."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved its state."""


class StopRequest:
    """Context that notes signals instead of ending the process.

    A second Ctrl-C stops at once, without saving; but not with several processes, where the launcher passes on the
    signal that the terminal has already sent to all of them.

    Loader processes inherit the handlers; ``data.workers.ignore_first_signal`` makes them work there.

    Args:
        accelerator: Accelerator of the run, whose processes agree on when to stop.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.requested = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        loader = os.getpid() != self._process
        if self.requested and (loader or (number == signal.SIGINT and self.accelerator.num_processes == 1)):
            raise KeyboardInterrupt
        if not self.requested and not loader and self.accelerator.is_main_process:
            print("stopping after this step; progress will be saved", file=sys.stderr, flush=True)
        self.requested = True


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any process; called on all of them."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(counts, reduction="sum").tolist()]
