"""What each way of training an adder network reaches on Fashion-MNIST with ``cifar_resnet20``, and what it costs.

    python -m benchmarks.accuracy --runs runs/accuracy --json docs/results/accuracy.json --rows teacher distill-1

All rows train on the 60,000 training images with the same crops and flips, and are evaluated on the 10,000 test images.
Runs that are finished are not run again, and one that was cut off is resumed, so the table can be filled bit by bit;
without ``--rows`` all of it. The picture shows accuracy against training time, epoch by epoch.
"""

import argparse
import csv
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

from adderkit.convert.files import write_json, write_text

from .fashion_mnist import CALIBRATE, DATA, adderkit, hardware, versions

# One augmentation for all rows.
COMMON = [*DATA, "--set", "crop_padding=2", "--set", "hflip=0.5"]
TEACHER = ["--teacher", "teacher-seed0/best"]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of training: from which folder (or network) it starts, and what ``finetune`` is told."""

    label: str
    start: str
    options: tuple[str, ...]
    epochs: int
    colour: str


WAYS: dict[str, Way] = {
    "teacher": Way("CNN teacher", "cifar_resnet20", ("--no-pretrained", "--recipe", "cnn"), 6, "#555555"),
    "scratch": Way("from scratch, as in the paper", "random", ("--recipe", "addernet-cifar"), 10, "#CC79A7"),
    "random-distill": Way(
        "random weights, distilled",
        "random",
        ("--recipe", "addernet-cifar", "--set", "distill_loss_weight=1", "--set", "task_loss_weight=0", *TEACHER),
        10,
        "#E69F00",
    ),
    "distill-1": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 1, "#56B4E9"),
    "distill-3": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 3, "#0072B2"),
    "distill-10": Way("calibrated, distilled", "calibrated", ("--recipe", "distill", *TEACHER), 10, "#004466"),
    "pkkd": Way("calibrated, pkkd", "calibrated", ("--recipe", "pkkd", *TEACHER), 3, "#009E73"),
}
STARTS = {
    "calibrated": ["convert", "--model", "teacher-seed0/best", *CALIBRATE],
    "random": ["convert", "--model", "teacher-seed0/best"],
}


def main() -> None:
    """Run what is missing, and write JSON, picture and table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--json", type=Path, default=Path("docs/results/accuracy.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/accuracy.png"))
    parser.add_argument("--rows", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for name in arguments.rows:
        for seed in arguments.seeds:
            train(arguments.runs, name, seed, arguments.workers)
            found = rows(arguments.runs)
            write_json(arguments.json, {"rows": found, "hardware": hardware(), "versions": versions()})
            draw(found, arguments.picture)
            write_text(arguments.runs / "table.md", table(found))
    print(table(rows(arguments.runs)))


def train(runs: Path, name: str, seed: int, workers: int) -> None:
    """Run a way with a seed to its end, from where an earlier run stopped; seconds add up in a file beside it."""
    way, folder = WAYS[name], f"{name}-seed{seed}"
    timing = runs / f"{folder}.seconds"
    done = len(epochs_of(runs / folder))
    if done >= way.epochs:
        return
    if way.start in STARTS and not (runs / way.start).exists():
        adderkit(runs, [*STARTS[way.start], "--output", way.start])
    settings = ["--epochs", str(way.epochs), "--seed", str(seed), "--workers", str(workers)]
    fresh = [way.start, *way.options, *COMMON, *settings, "--save-every", "100", "--output", folder]
    command = ["finetune", *(["--resume", folder] if (runs / folder / "last").exists() else fresh)]
    before, started = float(timing.read_text()) if timing.exists() else 0.0, time.perf_counter()
    try:
        adderkit(runs, command)
    finally:
        write_text(timing, str(before + time.perf_counter() - started))


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's ``summary.csv``; none where it has not got that far."""
    path = folder / "summary.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def rows(runs: Path) -> list[dict[str, Any]]:
    """A row for each finished run: best and last top-1, seconds, and the curve of top-1 by epoch."""
    found = []
    for name, way in WAYS.items():
        for timing in sorted(runs.glob(f"{name}-seed*.seconds")):
            curve = [row["eval_top1"] for row in epochs_of(timing.with_suffix(""))]
            if len(curve) == way.epochs:
                seed, seconds = int(timing.stem.rpartition("seed")[2]), round(float(timing.read_text()))
                facts = {"row": name, "label": way.label, "epochs": way.epochs, "seed": seed, "seconds": seconds}
                found.append({**facts, "last": curve[-1], "best": max(curve), "curve": curve})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown, seeds of a row together: mean and range."""
    lines = ["| way | epochs | seeds | top-1 % after the last epoch | seconds |", "|---|---|---|---|---|"]
    for name, way in WAYS.items():
        same = [row for row in found if row["row"] == name]
        if same:
            last = [row["last"] for row in same]
            spread = f" ({min(last):.2f} to {max(last):.2f})" if len(last) > 1 else ""
            seconds = statistics.mean(row["seconds"] for row in same)
            seeds = ", ".join(str(row["seed"]) for row in same)
            lines.append(
                f"| {way.label} | {way.epochs} | {seeds} | {statistics.mean(last):.2f}{spread} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Top-1 after each epoch against seconds of training, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for row in found:
        way, curve = WAYS[row["row"]], row["curve"]
        label = f"{way.label}, {way.epochs} epochs" if row["row"] not in labelled else None
        labelled.add(row["row"])
        minutes = [row["seconds"] / 60 * (epoch + 1) / len(curve) for epoch in range(len(curve))]
        axes.plot(minutes, curve, color=way.colour, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("top-1 (%), 10,000 test images")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
