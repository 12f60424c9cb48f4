r"""Accuracy and cost of several ways to train an adder network, on Fashion-MNIST with ``cifar_resnet20``.

    python -m benchmarks.accuracy.fashion_mnist_table --runs runs/accuracy \
        --json docs/results/accuracy.json --rows teacher distill-1

All rows train on the 60,000 training images with the same crops and flips, and are evaluated on the 10,000 test images.
Finished runs are not repeated and interrupted runs are resumed, so the table can be filled step by step; without
``--rows``, all rows are run. The picture shows accuracy against cost, epoch by epoch. Costs are CPU time, including
calibration but not the training of the teacher.
"""

import argparse
import csv
import dataclasses
import json
import signal
import statistics
from pathlib import Path
from typing import Any

from adderkit.convert.files import write_json, write_text

from .costs import cost, timed
from .fashion_mnist import CALIBRATE, DATA, adderkit, hardware, versions

# The same augmentation for all rows.
COMMON = [*DATA, "--set", "crop_padding=2", "--set", "hflip=0.5"]
TEACHER = ["--teacher", "teacher-seed0/best"]
# All weights are random, including first convolution and classifier; pkkd's teacher starts from random weights too.
RANDOM = ["--no-pretrained"]
DRAWN = (80, 94)  # networks with random weights start at 10 %
LOGITS_ALONE = ["--set", "distill_loss_weight=1", "--set", "task_loss_weight=0"]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of training.

    Args:
        label: Label of the row.
        start: Folder or network to start from.
        options: Options of ``finetune``.
        epochs: Number of epochs; with 0, the start is evaluated without training.
        color: Color of the curve.
    """

    label: str
    start: str
    options: tuple[str, ...]
    epochs: int
    color: str


WAYS: dict[str, Way] = {
    "teacher": Way("CNN teacher", "cifar_resnet20", ("--no-pretrained", "--recipe", "cnn"), 6, "#555555"),
    "scratch": Way("from scratch, as in the paper", "random", (*RANDOM, "--recipe", "addernet-cifar"), 10, "#CC79A7"),
    "random-distill": Way(
        "random weights, distilled",
        "random",
        (*RANDOM, "--recipe", "addernet-cifar", *LOGITS_ALONE, *TEACHER),
        3,
        "#E69F00",
    ),
    "pkkd": Way("random weights, pkkd", "random", (*RANDOM, "--recipe", "pkkd", *TEACHER), 3, "#009E73"),
    "calibrated": Way("calibrated, not trained", "calibrated", (), 0, "#56B4E9"),
    "predictions-1": Way(
        "calibrated, distilled by predictions alone",
        "calibrated",
        ("--recipe", "distill", "--set", "block_loss_weight=0", *TEACHER),
        1,
        "#999999",
    ),
    "distill-1": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 1, "#56B4E9"),
    "distill-3": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 3, "#0072B2"),
    "distill-10": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 10, "#004466"),
}
STARTS = {
    "calibrated": ["convert", "--model", "teacher-seed0/best", *CALIBRATE],
    "random": ["convert", "--model", "teacher-seed0/best"],
}


def main() -> None:
    """Run the missing rows, and write JSON, picture and table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--json", type=Path, default=Path("docs/results/accuracy.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/accuracy.png"))
    parser.add_argument("--rows", nargs="*", choices=WAYS, default=list(WAYS), help="rows to run; none without a name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a run is interrupted and saves its state
    for name in arguments.rows:
        for seed in arguments.seeds:
            train(arguments.runs, name, seed, arguments.workers)
            write(arguments)
    print(write(arguments))


def write(arguments: argparse.Namespace) -> str:
    """Write JSON, picture and table of the finished rows, and return the table."""
    found = rows(arguments.runs)
    write_json(arguments.json, {"rows": found, "hardware": hardware(), "versions": versions()})
    draw(found, arguments.picture)
    lines = table(found)
    write_text(arguments.runs / "table.md", lines)
    return lines


def train(runs: Path, name: str, seed: int, workers: int) -> None:
    """Run a way of training with a seed to its end, resuming an interrupted run."""
    way, folder = WAYS[name], f"{name}-seed{seed}"
    if way.start in STARTS:
        if not (runs / way.start).exists():
            timed(runs, [*STARTS[way.start], "--output", way.start], cost_file(runs, way.start))
        evaluation = evaluation_file(runs, way.start)
        if not evaluation.exists():
            write_text(evaluation, adderkit(runs, ["evaluate", way.start, *DATA, "--json"]))
    if len(epochs_of(runs / folder)) < way.epochs:
        settings = ["--epochs", str(way.epochs), "--seed", str(seed), "--workers", str(workers)]
        start = [way.start, *way.options, *COMMON, *settings, "--save-every", "100", "--output", folder]
        resumable = (runs / folder / "last").exists()
        timed(runs, ["finetune", *(["--resume", folder] if resumable else start)], cost_file(runs, folder))


def cost_file(runs: Path, folder: str) -> Path:
    """Return the file with the time that creating a folder has taken."""
    return runs / f"{folder}.cost.json"


def evaluation_file(runs: Path, folder: str) -> Path:
    """Return the file with the evaluation of a start before any training."""
    return runs / f"{folder}.evaluation.json"


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """Read the rows of a run's ``summary.csv``; none if the file does not exist yet."""
    path = folder / "summary.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def rows(runs: Path) -> list[dict[str, Any]]:
    """Return a row for each finished run: best and last top-1, cost, and top-1 by epoch, beginning with the start."""
    found = []
    for name, way in WAYS.items():
        evaluation = evaluation_file(runs, way.start)
        start = [json.loads(evaluation.read_text())["top1"]] if evaluation.exists() else []
        for seed in seeds_of(runs, name) if way.epochs else [0]:
            trained = [row["eval_top1"] for row in epochs_of(runs / f"{name}-seed{seed}")]
            curve = [*start, *trained]
            if len(trained) == way.epochs and curve:
                facts = {"row": name, "label": way.label, "epochs": way.epochs, "seed": seed}
                costs = {"start": cost(cost_file(runs, way.start)), "cost": cost(cost_file(runs, f"{name}-seed{seed}"))}
                found.append({**facts, **costs, "last": curve[-1], "best": max(curve), "curve": curve})
    return found


def seeds_of(runs: Path, name: str) -> list[int]:
    """Return the seeds of the existing runs of a way."""
    return sorted(int(path.name.rpartition("seed")[2]) for path in runs.glob(f"{name}-seed*/"))


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, with mean and range over seeds."""
    lines = ["| way | epochs | seeds | top-1 % after the last epoch | CPU minutes |", "|---|---|---|---|---|"]
    for name, way in WAYS.items():
        same = [row for row in found if row["row"] == name]
        if same:
            last = [row["last"] for row in same]
            spread = f" ({min(last):.2f} to {max(last):.2f})" if len(last) > 1 else ""
            minutes = statistics.mean(row["start"]["cpu_seconds"] + row["cost"]["cpu_seconds"] for row in same) / 60
            seeds = ", ".join(str(row["seed"]) for row in same)
            top1 = f"{statistics.mean(last):.2f}{spread}"
            spent = f"{minutes:.1f}" if minutes else ""  # the teacher was not timed
            lines.append(f"| {way.label} | {way.epochs} | {seeds} | {top1} | {spent} |")
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Draw top-1 after each epoch against CPU time, a line for each run, and the teacher's accuracy as a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labeled: set[str] = set()
    for row in found:
        way, curve = WAYS[row["row"]], row["curve"]
        label = f"{way.label}, {way.epochs} epoch{'s' * (way.epochs > 1)}" if row["row"] not in labeled else None
        labeled.add(row["row"])
        if row["row"] == "teacher":
            axes.axhline(row["last"], color=way.color, linewidth=1.2, linestyle="--", label=label)
        elif way.epochs:
            before, own = row["start"]["cpu_seconds"], row["cost"]["cpu_seconds"]
            first = way.epochs - len(curve) + 1  # 0 if the curve begins with the start
            minutes = [(before + own * epoch / way.epochs) / 60 for epoch in range(first, way.epochs + 1)]
            axes.plot(minutes, curve, color=way.color, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set_xlabel("minutes of CPU time, calibration included")
    axes.set_ylabel("top-1 (%), 10,000 test images")
    axes.set_ylim(*DRAWN)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
