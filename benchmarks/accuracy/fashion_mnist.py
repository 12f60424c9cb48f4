"""Accuracy of conversion without training, on Fashion-MNIST with ``cifar_resnet20``, by the documented commands.

    python -m benchmarks.accuracy.fashion_mnist --runs runs/fashion-mnist --json docs/results/fashion_mnist.json

Steps whose folder exists are not run again. Writes a JSON file, and a picture for the documentation.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

DATA = ["--dataset", "fashion-mnist"]
CONVERT = ["convert", "--model", "teacher/best", "--to", "adder"]
CALIBRATE = [*DATA, "--calibration-images", "1024"]

# label, folder to evaluate, command that creates it
STEPS: list[tuple[str, str, list[str]]] = [
    (
        "CNN teacher, 6 epochs",
        "teacher/best",
        ["finetune", "cifar_resnet20", "--no-pretrained", *DATA, "--epochs", "6", "--output", "teacher"],
    ),
    ("adder network, weights copied", "copied", [*CONVERT, "--output", "copied"]),
    (
        "a scale for each filter (1,024 images, no labels)",
        "scaled",
        [*CONVERT, *CALIBRATE, "--calibration-steps", "0", "--matching-steps", "0", "--output", "scaled"],
    ),
    (
        "each layer fitted (1,024 images, no labels)",
        "fitted",
        [*CONVERT, *CALIBRATE, "--matching-steps", "0", "--output", "fitted"],
    ),
    (
        "then all together (1,024 images, no labels)",
        "calibrated",
        [*CONVERT, *CALIBRATE, "--output", "calibrated"],
    ),
]


def main() -> None:
    """Run the missing steps, evaluate all, and write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion-mnist"))
    parser.add_argument("--json", type=Path, default=Path("docs/results/fashion_mnist.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/fashion_mnist.png"))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rows = [run_step(arguments.runs, *step) for step in STEPS]
    result = {"rows": rows, "hardware": hardware(), "versions": versions()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, arguments.picture)
    for row in rows:
        print(f"{row['top1']:6.2f}  {row['label']}")


def run_step(runs: Path, label: str, folder: str, command: list[str]) -> dict[str, Any]:
    """Create the folder unless it exists, and evaluate it on the 10,000 test images."""
    timing = runs / f"{folder.split('/')[0]}.seconds"
    if not (runs / folder).exists():
        started = time.perf_counter()
        adderkit(runs, command)
        timing.write_text(str(time.perf_counter() - started))
    found = json.loads(adderkit(runs, ["evaluate", folder, "--dataset", "fashion-mnist", "--json"]))
    seconds = float(timing.read_text()) if timing.exists() else None
    return {**found, "label": label, "command": " ".join(["adderkit", *command]), "seconds": seconds}


def adderkit(folder: Path, command: list[str]) -> str:
    """Run an adderkit command in a folder and return its standard output."""
    print("$ adderkit", *command, file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "adderkit", *command], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def hardware() -> dict[str, Any]:
    """Describe the hardware of the measurements."""
    import torch

    from adderkit.adder_layers.backends import cpu

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def versions() -> dict[str, str]:
    """Return the versions of the relevant packages."""
    return {name: version(name) for name in ("adderkit", "torch", "timm", "accelerate")}


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw the top-1 accuracy of every row as horizontal bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    labels = [row["label"] for row in rows][::-1]
    values = [row["top1"] for row in rows][::-1]
    colors = ["#3b6ea5" if "teacher" in label else "#d9822b" for label in labels]
    bars = axes.barh(labels, values, color=colors)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set_xlim(0, 109)
    axes.set_xlabel("top-1 (%), 10,000 test images")
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
