"""Ctrl-C and SIGTERM: a run ends between two optimizer steps and saves, rather than wherever it happens to be."""

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
    """A run was asked to stop, and has saved where it was."""


class StopRequest:
    """Notes signals while it is entered.

    A second Ctrl-C stops at once, without saving. Not with several processes: there the launcher passes on what the
    terminal has sent to all of them already.

    Loader processes inherit this, see ``ignore_first_signal``.

    Args:
        accelerator: Of the run; its processes agree on when to stop.
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
            print("stopping after this step; what is done will be saved", file=sys.stderr, flush=True)
        self.requested = True


def ignore_first_signal(worker: int) -> None:
    """To be called in a loader process when it starts: one signal does not end it, a second one does.

    A terminal or a batch system signals the whole group, and the step that is being done still needs its images. torch
    has its own handler of SIGTERM there, set where Python does not see it; here Python's comes back.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):  # inherited from a StopRequest
        signal.signal(signal.SIGTERM, handler)


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether each flag is set on any process; called on all of them."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [count > 0 for count in accelerator.reduce(counts, reduction="sum").tolist()]
