"""Trials of the benchmarks that convert a CNN without labels or training: terms by layer, joint fits, hybrids.

Fitted networks are kept in a folder, since later trials start from them. Trials that have a result are not run again,
and an interrupted fit goes on.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adderkit
from adderkit.convert.calibration.calibrate import CalibrationReport, LayerFidelity
from adderkit.convert.calibration.config import HybridPolicy, TermPolicy
from adderkit.convert.calibration.hybrid import best_terms, keep_convolutions_, layers_to_keep
from adderkit.convert.conversion.plan import ConversionPlan
from adderkit.convert.cost.report import Cost
from adderkit.convert.files import atomic_path

from ..timing import hardware

LAYERS, JOINT = "layers", "layers, then blocks"


class Choice(NamedTuple):
    """Trials of a benchmark, the most informative ones first.

    Args:
        terms: Terms of every layer: from 1 to the most that a layer may get by the choice for ``additions``.
        additions: Additions of trials whose terms are chosen by layer, as multiples of those with one term.
        multiplications: Multiplications of hybrids, as shares of the teacher's.
        hybrid_terms: Terms of the hybrids' adder layers.
    """

    terms: tuple[int, ...]
    additions: tuple[float, ...]
    multiplications: tuple[float, ...] = ()
    hybrid_terms: tuple[int, ...] = ()


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
        quantize: Makes the network in 8-bit integers that is measured too; none by default.
    """

    original: nn.Module
    images: Tensor
    evaluation: tuple[Tensor, Tensor]
    config: adderkit.CalibrationConfig
    fits: Path
    trials: dict[str, Any]
    quantize: Callable[[nn.Module], nn.Module] | None = None

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

    def choose_terms(self, choice: tuple[int, ...], additions: float) -> dict[str, int]:
        """Choose the terms of each layer among some numbers, by the fidelities of their fits in every layer."""
        rows = [self.trials[key_of(f"terms={terms}", LAYERS)]["layers"] for terms in sorted(choice)]
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
        integers = {}
        if self.quantize is not None:
            integers["int8 top-1"] = scores(self.quantize(student), self.original, self.evaluation)["top-1"]
        return {
            **scores(student, self.original, self.evaluation),
            **integers,
            "additions": round(found.additions / self._cost(1).additions, 3),
            "multiplications": round(found.multiplications / self._cost(None).multiplications, 3),
            "seconds": round(seconds),
        }

    def _cost(self, terms: int | None) -> Cost:
        """Count the cost of the teacher, or of its conversion with some terms a weight."""
        return adderkit.cost(self.original if terms is None else self._converted(terms), self.images[:1])


def resumed(target: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results to write to a JSON file, with the trials that it already holds for the same settings."""
    earlier = json.loads(target.read_text()) if target.exists() else {}
    trials = earlier["trials"] if earlier.get("settings") == settings else {}
    return {"settings": settings, "hardware": hardware("cpu"), "trials": trials}


def key_of(name: str, method: str) -> str:
    """Return the key of a trial in the JSON."""
    return f"{name}, {method}"


def run(benchmark: Benchmark, choice: Choice, save: Callable[[], None]) -> None:
    """Run the missing trials; ``save`` is called after each."""

    def trial(name: str, method: str, measure: Callable[..., dict[str, Any]], *values: Any) -> None:
        key = key_of(name, method)
        if key not in benchmark.trials:
            benchmark.trials[key] = measure(name, *values)
            save()
        row = benchmark.trials[key]
        print(f"{key}: {row['agreement']} % agree, top-1 {row['top-1']} %, {row['seconds']} s", flush=True)

    for terms in choice.terms:
        trial(f"terms={terms}", LAYERS, benchmark.fit_layers, terms)
    for terms in choice.hybrid_terms:
        for share in choice.multiplications:
            trial(f"terms={terms}", f"mults={share:.0%}", benchmark.keep_worst, terms, share)
    chosen: dict[str, int | Mapping[str, int]] = {}
    for additions in choice.additions:
        chosen[f"adds={additions:.0%}"] = terms_by_layer = benchmark.choose_terms(choice.terms, additions)
        trial(f"adds={additions:.0%}", LAYERS, benchmark.fit_layers, terms_by_layer)
    for name, every in ({f"terms={terms}": terms for terms in choice.terms} | chosen).items():
        trial(name, JOINT, benchmark.fit_jointly, every)


@torch.no_grad()
def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Return the top-1 class of each image, ``[N]``."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(500)])


def scores(model: nn.Module, original: nn.Module, evaluation: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return top-1 accuracy and agreement with the original in percent."""
    images, labels = evaluation
    found, wanted = predictions(model, images), predictions(original, images)
    return {
        name: round(100 * (found == compared).float().mean().item(), 2)
        for name, compared in (("top-1", labels), ("agreement", wanted))
    }
