"""Sweep over timm: plan, convert, run, save, load and revert every model, or refuse it for one clear reason.

    python -m benchmarks.coverage.timm_sweep                       # all models; resumes where it was stopped
    python -m benchmarks.coverage.timm_sweep --models 'resnet*' --limit 5
    python -m benchmarks.coverage.timm_sweep --report docs/coverage.md

Every model is planned on ``meta`` tensors at its own input size. One model of each family, and every model below 30 M
parameters, is also built with random weights and run on the smallest input that it accepts. Results are lines of JSON,
one for each trial; worker processes are replaced if they crash or take too long.
"""

import argparse
import fnmatch
import json
import logging
import multiprocessing
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from timm.models import list_models, model_entrypoint

from .table import SMALL, report
from .timm_trial import trial

OWN = ("adder", "cifar_")  # names that adderkit adds to timm's registry
RESULTS = Path("build/timm_sweep.jsonl")

Job = tuple[str, str]  # (kind, model): kind is "plan" or "run"
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Read the results so far, ignoring a line that was cut short when the sweep was killed."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Group models by the file of timm that defines them."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[model_entrypoint(name).__module__.rsplit(".", 1)[-1]].append(name)
    return dict(found)


def jobs(names: list[str], lines: list[Line], real: str) -> Iterator[Job]:
    """Iterate over the remaining jobs: plans, one run for each family, then runs of all small models."""
    done = {(line["kind"], line["model"]) for line in lines}
    plans = {line["model"]: line for line in lines if line["kind"] == "plan"}
    for name in names:
        if ("plan", name) not in done:
            yield "plan", name
    if real == "none":
        return

    def size(name: str) -> int:
        return int(plans.get(name, {}).get("parameters", 10**12))

    converting = [name for name in names if plans.get(name, {}).get("converted", 0)]
    first = [min(members, key=size) for members in families(converting).values()]
    small = [name for name in sorted(converting, key=size) if size(name) < SMALL] if real == "small" else []
    for name in dict.fromkeys([*first, *small]):
        if ("run", name) not in done:
            yield "run", name


class Worker:
    """Process that runs trials one by one; it is replaced after a crash or a trial that takes too long."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process: multiprocessing.process.BaseProcess | None = None

    def run_trial(self, job: Job) -> Line:
        """Run a trial and return its result, or a failure if the process crashes or takes too long."""
        if self.process is None or not self.process.is_alive():
            self._start()
        try:
            self.pipe.send(job)
            if self.pipe.poll(self.timeout):
                line: Line = self.pipe.recv()
                return line
            failure = f"took more than {self.timeout:g} s"
        except (EOFError, OSError):
            failure = "the process died"
        self.stop()
        return {"kind": job[0], "model": job[1], "failure": failure}

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


def _serve(pipe: Connection) -> None:
    """Run trials in the process, without warnings and with one thread, since workers share few cores."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    while True:
        pipe.send(trial(*pipe.recv()))


def run(todo: list[Job], results: Path, workers: int, timeout: float) -> None:
    """Run jobs and append a line for each to the results."""
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in todo:
        queue.put(job)
    lock, started = threading.Lock(), time.time()
    results.parent.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        worker = Worker(timeout)
        while True:
            try:
                job = queue.get_nowait()
            except Empty:
                worker.stop()
                return
            line = worker.run_trial(job)
            with lock, results.open("a") as file:
                file.write(json.dumps(line) + "\n")
                state = line.get("failure") or line.get("refused") or "ok"
                print(f"{time.time() - started:7.0f} s  {job[0]:<4}  {job[1]:<40}  {state:.100}", flush=True)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Run the remaining jobs, or write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="glob of model names")
    parser.add_argument("--limit", type=int, help="largest number of trials")
    parser.add_argument("--real", choices=("small", "families", "none"), default="small", help="which models are run")
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds per trial")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of results, read and appended to")
    parser.add_argument("--report", type=Path, help="write the document from the results instead of running trials")
    options = parser.parse_args()
    names = [name for name in list_models() if not name.startswith(OWN) and fnmatch.fnmatch(name, options.models)]
    if options.report is not None:
        options.report.write_text(report(read(options.results), families(names)))
        return
    # The models to run depend on the plans, so the remaining jobs are determined again.
    while todo := list(jobs(names, read(options.results), options.real)):
        plans = [job for job in todo if job[0] == "plan"]
        run((plans or todo)[: options.limit], options.results, options.workers, options.timeout)
        if options.limit is not None:
            break


if __name__ == "__main__":
    main()
