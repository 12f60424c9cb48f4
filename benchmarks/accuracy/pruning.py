r"""Accuracy after pruning by each importance, at equal additions: Fashion-MNIST, ``cifar_resnet20``.

    python -m benchmarks.accuracy.pruning --model runs/fashion-mnist/calibrated \
        --teacher runs/fashion-mnist/teacher/best

For each row a network is pruned, evaluated, fine-tuned briefly by distillation and evaluated again, by the documented
commands. Each row is written when it is complete. Rows in the JSON are not measured again, and existing folders are
reused.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from .fashion_mnist import adderkit, hardware, versions

REMOVED = (30, 50)  # percent of the additions
IMPORTANCES = ("variance", "taylor", "batchnorm", "magnitude", "random")
DATA = ("--dataset", "fashion-mnist")


def main() -> None:
    """Measure the missing rows and write each when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="calibrated adder network")
    parser.add_argument("--teacher", type=Path, required=True, help="CNN that the model was made from")
    parser.add_argument("--runs", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--json", type=Path, default=Path("docs/results/pruning.json"))
    parser.add_argument("--images", type=int, default=512, help="unlabeled images to prune on")
    parser.add_argument("--train-images", type=int, default=20000, help="images per epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--removed", type=int, nargs="+", default=REMOVED, help="percent of the additions")
    parser.add_argument("--importance", nargs="+", default=IMPORTANCES, choices=IMPORTANCES)
    parser.add_argument("--global", dest="across", action="store_true", help="compare channels across layers")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("images", "train_images", "epochs", "across")}
    arguments.runs.mkdir(parents=True, exist_ok=True)
    result = read(arguments.json, settings)
    if "whole" not in result:
        result["whole"] = evaluated(arguments.runs, arguments.model.resolve())
        write(arguments.json, result)
    for removed, importance in itertools.product(arguments.removed, arguments.importance):
        done = {(row["removed"], row["importance"]) for row in result["rows"]}
        if (removed, importance) not in done:
            result["rows"].append(measure(arguments, removed, importance))
            result["rows"].sort(key=lambda row: (row["removed"], IMPORTANCES.index(row["importance"])))
            write(arguments.json, result)
    print(table(result))


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read earlier results with the same settings, or start new ones; refuse results with other settings."""
    empty = {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": []}
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else empty
    if found["settings"] != settings:
        raise SystemExit(f"{path} was measured with {found['settings']}; choose another file with --json")
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def measure(arguments: argparse.Namespace, removed: int, importance: str) -> dict[str, Any]:
    """Prune, evaluate, fine-tune and evaluate again; return the row."""
    runs, name = arguments.runs, f"{importance}-{removed}{'-global' if arguments.across else ''}"
    prune = ["prune", str(arguments.model.resolve()), "--target", f"adds={100 - removed}%", "--importance", importance]
    prune += [*DATA, "--calibration-images", str(arguments.images), "--output", f"{name}-pruned"]
    prune += ["--global"] if arguments.across else []
    tune = ["finetune", f"{name}-pruned", "--teacher", str(arguments.teacher.resolve()), *DATA]
    tune += ["--set", f"train_images={arguments.train_images}", "--epochs", str(arguments.epochs)]
    if not (runs / f"{name}-pruned").exists():
        adderkit(runs, prune)
    report = json.loads((runs / f"{name}-pruned" / "adder_report.json").read_text())["pruning"]
    before = evaluated(runs, Path(f"{name}-pruned"))
    if (runs / f"{name}-tuned" / "args.yaml").exists():
        adderkit(runs, ["finetune", "--resume", f"{name}-tuned"])
    else:
        adderkit(runs, [*tune, "--output", f"{name}-tuned"])
    return {
        "removed": removed,
        "importance": importance,
        "additions": report["after"]["adds"] / report["before"]["adds"],
        "parameters": report["after"]["params"] / report["before"]["params"],
        "pruned": before,
        "tuned": evaluated(runs, Path(f"{name}-tuned/best")),
    }


def evaluated(runs: Path, folder: Path) -> dict[str, float]:
    """Return top-1 accuracy and loss on the 10,000 test images."""
    found = json.loads(adderkit(runs, ["evaluate", str(folder), *DATA, "--json"]))
    return {key: found[key] for key in ("top1", "loss")}


def table(result: dict[str, Any]) -> str:
    """Return the rows as a Markdown table for the documentation."""
    lines = [
        "| importance | additions removed | top-1 after pruning | after fine-tuning |",
        "|---|---|---|---|",
        f"| (whole network) | 0 % | {result['whole']['top1']:.1f} % | |",
    ]
    lines += [
        f"| {row['importance']} | {100 * (1 - row['additions']):.0f} % | {row['pruned']['top1']:.1f} % "
        f"| {row['tuned']['top1']:.1f} % |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
