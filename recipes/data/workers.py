"""Loader processes: how many to start, and how they treat signals."""

import os
import signal


def loader_workers(wanted: int) -> int:
    """Return the number of loader processes: as many as wanted, but at most one per processor available."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, processors)


def ignore_first_signal(worker: int) -> None:
    """Keep a loader process alive through the first SIGTERM; the second one ends it. A ``worker_init_fn``.

    A terminal or a batch system signals the whole process group, and the optimizer step in progress still needs its
    images. torch installs its own SIGTERM handler in loader processes, at C level where Python does not see it; this
    reinstalls the Python handler inherited from the parent process.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):  # inherited from a StopRequest
        signal.signal(signal.SIGTERM, handler)
