"""Run all GPU tests and benchmarks and write one JSON file: tests, training steps, and every layer.

    python benchmarks/gpu/run.py --json gpu.json --minutes 8

Needs the repository and its Python packages, but does not need adderkit to be installed. If a section fails, the error
is recorded and the others run; sections for which there is no time are left out and listed.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Most of a test is compilation on one core; each process needs some GPU memory.
TEST_PROCESSES = 10
# Seconds for the quantized layers, for which their fp32 kernels and convolutions are timed again.
INTEGER_SECONDS = 60.0
# Seconds reserved for writing the result.
RESERVE = 10.0


class Report:
    """Results of all sections, written after each, and the time that is left."""

    def __init__(self, path: Path, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.clock = clock
        self.deadline = clock() + 60 * minutes
        self.content: dict[str, Any] = {"errors": {}, "left_out": [], "seconds": {}}

    @property
    def remaining(self) -> float:
        """Seconds that a section may still use."""
        return self.deadline - self.clock() - RESERVE

    def run(self, name: str, section: Callable[[], Any], needs: float = 0.0) -> Any:
        """Run a section and record its result or its error; leave it out if fewer than ``needs`` seconds remain."""
        if self.remaining < max(needs, 1.0):
            self.content["left_out"].append(name)
            print(f"{name}: left out, {max(self.remaining, 0):.0f} s are left", flush=True)
            self.write()
            return None
        started, result = self.clock(), None
        try:
            result = self.content[name] = section()
        except Exception:
            self.content["errors"][name] = traceback.format_exc()
            print(f"{name}: {self.content['errors'][name]}", flush=True)
        self.content["seconds"][name] = round(self.clock() - started, 1)
        print(f"{name}: {self.content['seconds'][name]} s{shown(result)}", flush=True)
        self.write()
        return result

    def write(self) -> None:
        """Write the results so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def shown(result: Any) -> str:
    """Format a short result; long ones are only in the file."""
    text = str(result)
    return f", {text}" if result is not None and len(text) < 800 else ""


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests of ``tests/gpu`` in parallel processes; return counts, and failures with their messages."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*pytest, "--collect-only", "tests/gpu"], cwd=ROOT, capture_output=True, text=True)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not names:
        raise RuntimeError(listed.stdout[-2000:] + listed.stderr[-2000:])
    with TemporaryDirectory() as folder:
        running = []
        for index in range(min(TEST_PROCESSES, len(names))):
            report = Path(folder) / f"{index}.xml"
            command = [*pytest, f"--junit-xml={report}", *names[index::TEST_PROCESSES]]
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.append((process, report))
        stop = time.monotonic() + seconds
        for process, _ in running:
            try:
                process.wait(max(1.0, stop - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return counts([report.read_text() for _, report in running if report.exists()], len(names))


def counts(reports: list[str], collected: int) -> dict[str, Any]:
    """Sum up JUnit reports; a test that no report mentions did not finish."""
    result: dict[str, Any] = {"collected": collected, "passed": 0, "skipped": 0, "failed": 0, "failures": {}}
    for report in reports:
        for case in xml.etree.ElementTree.fromstring(report).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error")), None)
            if problem is not None:
                result["failed"] += 1
                result["failures"][case.get("name")] = (problem.get("message") or "")[:500]
            else:
                result["skipped" if case.find("skipped") is not None else "passed"] += 1
    result["unfinished"] = collected - result["passed"] - result["skipped"] - result["failed"]
    return result


def measure_layers(
    report: Report, layers: list[Any], timer: Callable[..., list[float]], device: str, limit: float | None
) -> list[dict[str, Any]]:
    """Measure the layers for which there is time; ``limit`` is in giga-terms per second."""
    from benchmarks.gpu import layers as gpu_layers

    rows: list[dict[str, Any]] = []
    for layer in spread(layers):
        for mode in gpu_layers.MODES:
            name = f"layer {layer.model} {layer.input} {layer.weight} {mode}"
            if report.remaining < 5:
                report.content["left_out"].append(name)
                continue
            try:
                rows.append(gpu_layers.measure(layer, mode, timer, device, limit))
            except Exception:
                report.content["errors"][name] = traceback.format_exc()
                continue
            rates = {name: row["giga_terms_per_second"] for name, row in rows[-1]["functions"].items()}
            print(f"{name}: {rates}", flush=True)
    report.content["geometric_means"] = gpu_layers.geometric_means(rows)
    return rows


def spread(layers: list[Any]) -> list[Any]:
    """Return every other layer first, so that a run cut short includes all models."""
    return [*layers[::2], *layers[1::2]]


def main() -> int:
    """Run all sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all sections (default: 8)")
    arguments = parser.parse_args()
    sys.path[0] = str(ROOT)  # instead of this folder, whose modules belong to a package
    import torch

    from benchmarks.bootstrap import make_importable

    if not torch.cuda.is_available():
        print("error: torch finds no CUDA or ROCm device", file=sys.stderr)
        return 1
    make_importable()
    from benchmarks.gpu import integer as gpu_integer
    from benchmarks.gpu import layers as gpu_layers
    from benchmarks.gpu import training as gpu_training
    from benchmarks.gpu.timing import GraphTimer, hardware

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(arguments.json, arguments.minutes)
    limit = (report.run("hardware", hardware) or {}).get("issue_limit_giga_terms_per_second")
    layers = gpu_layers.all_layers()
    report.run("compilation", lambda: gpu_layers.compile_all(layers), 60.0)
    report.run("tests", lambda: run_tests(min(report.remaining, 240.0)), 60.0)
    for case in gpu_training.CASES:
        section = functools.partial(gpu_training.measure, case, "cuda", torch.cuda.synchronize)
        report.run(f"training {case.model} batch {case.batch} {case.mode}", section, 30.0)
    seconds = min(INTEGER_SECONDS, report.remaining / 2)
    spread_out = functools.partial(gpu_integer.measure_all, spread(layers), timer=GraphTimer(), device="cuda")
    report.run("integer layers", lambda: spread_out(seconds=seconds), 20.0)
    report.run("layers", lambda: measure_layers(report, layers, GraphTimer(), "cuda", limit), 20.0)
    tests = report.content.get("tests", {})
    passed = not report.content["errors"] and not tests.get("failed") and not tests.get("unfinished")
    print(f"{tests.get('passed', 0)} tests passed, {tests.get('failed', 0)} failed; written to {arguments.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
