"""Timing on a GPU by events or captured graphs, and the limits that rates are compared with."""

import subprocess
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton  # type: ignore[import-untyped]

from ..timing import quantiles

# Lanes of an NVIDIA multiprocessor that issue fp32 instructions, and instructions per term.
LANES, INSTRUCTIONS_PER_TERM = 128, 2
WARM_UP = 2
# Milliseconds of measurement per function, and bounds on the number of runs.
SPAN, FEWEST, MOST = 40.0, 5, 50


class Timer(Protocol):
    """A callable that runs a function repeatedly and returns the milliseconds of each run."""

    def __call__(self, function: Callable[[], Any]) -> list[float]:
        """Time ``function``."""
        ...


class GraphTimer:
    """Timer by CUDA events around replays of a captured graph, which exclude the host's launches; caches are flushed.

    A function that cannot be captured is called instead.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(None).L2_cache_size
        self.flush = torch.empty(4 * size, dtype=torch.int8, device="cuda")

    def __call__(self, function: Callable[[], Any]) -> list[float]:
        """Time ``function``."""
        replay = captured(function) or function
        once = self._runs(replay, 2)[-1]
        return self._runs(replay, int(min(MOST, max(FEWEST, SPAN / max(once, 1e-3)))))

    def _runs(self, function: Callable[[], Any], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def captured(function: Callable[[], Any]) -> Callable[[], Any] | None:
    """Return a function that replays the device's work of ``function``; ``None`` if it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
        torch.cuda.synchronize()
        # torch.cuda.graph would empty the allocator's cache every time.
        try:
            graph.capture_begin()
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Return the median with 20 % and 80 % quantiles."""
    named = zip(("p20", "median", "p80"), quantiles(milliseconds), strict=True)
    return {name: float(f"{value:.5g}") for name, value in named}


def issue_limit(processors: int, megahertz: float) -> float:
    """Return the giga-terms per second for which a device can issue instructions."""
    return LANES * processors * megahertz * 1e6 / INSTRUCTIONS_PER_TERM / 1e9


def hardware() -> dict[str, Any]:
    """Describe the device, its limits, and the versions of the software."""
    properties = torch.cuda.get_device_properties(None)
    driver, megahertz = _query("driver_version"), _query("clocks.max.sm")
    result: dict[str, Any] = {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "driver": driver,
        "max_sm_mhz": float(megahertz) if megahertz else None,
        "sm_mhz_under_load": clock_under_load(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    clock = result["sm_mhz_under_load"] or result["max_sm_mhz"]
    result["issue_limit_giga_terms_per_second"] = issue_limit(result["processors"], clock) if clock else None
    return result


def clock_under_load() -> float | None:
    """Measure the multiprocessors' clock in MHz under load; ``None`` if the driver does not report it."""
    x = torch.randn(1 << 26, device="cuda")
    for _ in range(2000):
        x.abs_()
    megahertz = _query("clocks.sm")
    torch.cuda.synchronize()
    return float(megahertz) if megahertz else None


def _query(name: str) -> str | None:
    """Query one value of the first device from the driver's tool; ``None`` if it is not available."""
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    value = done.stdout.strip()
    return value if value and not value.startswith("[") else None
