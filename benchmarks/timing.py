"""Timing that compares like with like: functions take turns, and every figure is a median with its spread."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adderkit.adder_layers.backends import cpu

# A function that takes longer than the first is called three times only; than the second, once and without warming up.
SLOW_SECONDS, VERY_SLOW_SECONDS = 0.7, 1.5
SLOW_ROUNDS = 3
SETTLE_SECONDS = 0.02


def interleaved(
    timed: dict[str, Callable[[], Any]], device: str, rounds: int, settle: bool = False
) -> dict[str, list[float]]:
    """Seconds of each function, one after the other in every round, so that drift hits all alike.

    Args:
        timed: The functions.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: How often each is timed, less where it is slow.
        settle: Before each, wait until another library's threads have stopped spinning, and call it once untimed.
    """
    warm_up = {name: _seconds(function, device) for name, function in timed.items()}
    seconds = {name: [value] if value >= VERY_SLOW_SECONDS else [] for name, value in warm_up.items()}
    for round_ in range(rounds):
        for name, function in timed.items():
            if warm_up[name] < (VERY_SLOW_SECONDS if round_ < SLOW_ROUNDS else SLOW_SECONDS):
                if settle:
                    time.sleep(SETTLE_SECONDS)
                    function()
                seconds[name].append(_seconds(function, device))
    return seconds


def _seconds(function: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def quantiles(values: list[float]) -> list[float]:
    """20 %, 50 % and 80 %."""
    if len(values) == 1:
        return values * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [fifths[0], statistics.median(values), fifths[3]]


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Memory that a call needs beyond what is held before it; ``None`` where the system does not say."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the allocator would hide what this one needs
    reset.write_text("5")  # resets the high-water mark (man 5 proc)
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def hardware(device: str) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
    }
