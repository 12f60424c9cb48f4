"""Measure where calibration spends its time, with one pass for all layers and with a pass for each layer.

    python -m benchmarks.cpu.calibration --json docs/results/calibration.json

Weights and images are random, since the time does not depend on them. Seconds are CPU time, which other work on the
machine hardly affects. The seconds of passes and statistics grow with the images, those of fits with the steps.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch

import adderkit
from adderkit.convert.calibration import batchnorm_shift, calibrate, layerwise
from adderkit.convert.files import write_json

from ..timing import hardware

# Functions whose time is added up, as seen by the modules that call them.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "student passes": [(layerwise, "sample_windows")],
    "teacher passes": [(layerwise, "sample_outputs"), (layerwise, "layer_outputs")],
    "layer fits": [(layerwise, "_fit")],
    "joint fit": [(calibrate, "match_blocks_")],
    "statistics": [(calibrate, "reestimate_batchnorm_"), (batchnorm_shift, "measure_shifts")],
}


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Yield the CPU seconds of each phase, which grow inside the context."""
    seconds = dict.fromkeys(PHASES, 0.0)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[phase] += time.process_time() - started

        return run

    with ExitStack() as stack:
        for phase, functions in PHASES.items():
            for module, name in functions:
                stack.enter_context(patch.object(module, name, timed(phase, getattr(module, name))))
        yield seconds


def measure(name: str, images: int, size: int, config: adderkit.CalibrationConfig, together: bool) -> dict[str, float]:
    """Calibrate a network, and return the CPU seconds of each phase and of the whole.

    Args:
        name: Model name in timm's registry.
        images: Number of images.
        size: Their height and width.
        config: Settings of the calibration.
        together: Whether one pass serves all layers, rather than one each.
    """
    torch.manual_seed(0)
    teacher = timm.create_model(name).eval()
    student = copy.deepcopy(teacher)
    adderkit.convert_(student)
    batch = torch.randn(images, 3, size, size)
    with ExitStack() as stack:
        if not together:
            stack.enter_context(patch.object(layerwise, "stepped_graph", lambda *_: None))
        seconds = stack.enter_context(timed_phases())
        started = time.process_time()
        adderkit.calibrate_(student, teacher, batch, config)
        seconds["all"] = time.process_time() - started
    return {phase: round(value, 1) for phase, value in seconds.items()}


def main() -> None:
    """Measure every model, print a line for each way, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenetv2_100"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=adderkit.CalibrationConfig.samples)
    parser.add_argument("--steps", type=int, default=adderkit.CalibrationConfig.steps)
    parser.add_argument("--matching-steps", type=int, default=adderkit.CalibrationConfig.matching_steps)
    parser.add_argument("--batch-size", type=int, default=adderkit.CalibrationConfig.batch_size)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = adderkit.CalibrationConfig(
        arguments.steps,
        arguments.samples,
        matching_steps=arguments.matching_steps,
        batch_size=arguments.batch_size,
    )
    result: dict[str, Any] = {
        "hardware": hardware("cpu"),
        "images": arguments.images,
        "size": arguments.size,
        "config": config.to_dict(),
        "seconds": {},
    }
    for name in arguments.models:
        for way, together in (("one pass", True), ("a pass for each layer", False)):
            seconds = measure(name, arguments.images, arguments.size, config, together)
            result["seconds"].setdefault(name, {})[way] = seconds
            print(f"{name}, {way}: {seconds}", flush=True)
            if arguments.json is not None:
                write_json(arguments.json, result)  # an interrupted run keeps its results


if __name__ == "__main__":
    main()
