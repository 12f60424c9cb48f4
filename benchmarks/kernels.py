"""Adder kernels beside what one would use instead, layer by layer, interleaved in one run.

    python -m benchmarks.kernels --device cpu --models resnet18 cifar_resnet20 --json docs/results/kernels_cpu.json

For every distinct convolution of the models: forward and input gradient of ours, of ``F.conv2d``, and of
``torch.cdist(p=1)`` on unfolded input (forward only, where it needs less than 2 GB). Giga-terms per second: a term is
one ``|x - w|``, or one product for the convolution. Medians over the rounds, with 20 % and 80 % quantiles.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from adderkit.adder_layers import cpu
from adderkit.adder_layers.conv import adder_conv2d
from adderkit.convert.graph import trace_layers

BATCH = {"cpu": {"cifar_resnet20": 128}, "cuda": {"cifar_resnet20": 256}}
DEFAULT_BATCH = {"cpu": 8, "cuda": 256}
CDIST_LIMIT = 2 << 30
Timed = Callable[[], Any]


class Layer(NamedTuple):
    """A convolution to measure: shapes and arguments."""

    model: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int
    padding: int
    groups: int


def layers_of(name: str, device: str) -> list[Layer]:
    """The model's distinct convolutions, stem and classifier left out, at the benchmark's batch size."""
    model = timm.create_model(name)
    modules = dict(model.named_modules())
    batch = BATCH[device].get(name, DEFAULT_BATCH[device])
    found = []
    for layer in trace_layers(model)[1:-1]:
        module = modules[layer.path]
        if not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
            continue
        shape = (batch, *layer.input_shape[1:])
        entry = Layer(name, shape, tuple(module.weight.shape), module.stride[0], module.padding[0], module.groups)
        if entry not in found:
            found.append(entry)
    return found


def candidates(layer: Layer, device: str) -> tuple[dict[str, Timed], int]:
    """Functions to time by name, and the number of terms that each computes."""
    x, w = torch.randn(layer.input, device=device), torch.randn(layer.weight, device=device)
    stride, padding, groups = layer.stride, layer.padding, layer.groups
    output = F.conv2d(x, w, None, stride, padding, 1, groups)
    grad = torch.randn_like(output)
    pairs = ([stride, stride], [padding, padding], [1, 1])
    timed: dict[str, Timed] = {
        "adder forward": lambda: adder_conv2d(x, w, None, stride, padding, 1, groups),
        "conv forward": lambda: F.conv2d(x, w, None, stride, padding, 1, groups),
        "adder input grad": lambda: torch.ops.adderkit.adder_conv2d_input_grad(grad, x, w, *pairs, groups),
        "conv input grad": lambda: conv2d_input(x.shape, w, grad, stride, padding, 1, groups),
    }
    kernel = layer.weight[2:]
    if groups == 1 and output[:, 0].numel() * w[0].numel() * 4 < CDIST_LIMIT:
        timed["cdist forward"] = lambda: _cdist(x, w, kernel, stride, padding)
    return timed, output.numel() * w[0].numel()


def _cdist(x: Tensor, w: Tensor, kernel: Iterable[int], stride: int, padding: int) -> Tensor:
    columns = F.unfold(x, tuple(kernel), 1, padding, stride).transpose(1, 2)
    return torch.cdist(columns, w.flatten(1).expand(len(x), -1, -1), p=1.0)


def measure(timed: dict[str, Timed], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, one after the other in every round, so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(rounds + 1):
        for name, function in timed.items():
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure every layer, print a table and the geometric means, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet18", "mobilenetv2_100", "cifar_resnet20"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for layer in (layer for name in arguments.models for layer in layers_of(name, arguments.device)):
        timed, terms = candidates(layer, arguments.device)
        seconds = measure(timed, arguments.device, arguments.rounds)
        rates = {name: _quantiles([terms / value / 1e9 for value in values]) for name, values in seconds.items()}
        rows.append({**layer._asdict(), "terms": terms, "giga_terms_per_second": rates})
        shown = "  ".join(f"{name} {rate[1]:.1f}" for name, rate in rates.items())
        print(f"{layer.model} {layer.input} {layer.weight} s{layer.stride} g{layer.groups}: {shown}", flush=True)
    summary = {
        "adder / conv, forward": _ratio(rows, "adder forward", "conv forward"),
        "adder / conv, input gradient": _ratio(rows, "adder input grad", "conv input grad"),
        "adder / cdist, forward": _ratio(rows, "adder forward", "cdist forward"),
    }
    print("geometric means: " + ", ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        hardware = _hardware(arguments.device)
        arguments.json.write_text(json.dumps({"hardware": hardware, "summary": summary, "rows": rows}, indent=1) + "\n")


def _quantiles(values: list[float]) -> list[float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [fifths[0], statistics.median(values), fifths[3]]


def _ratio(rows: list[dict[str, Any]], first: str, second: str) -> float:
    """Geometric mean over layers of the ratio of median rates."""
    logs = [
        math.log(row["giga_terms_per_second"][first][1] / row["giga_terms_per_second"][second][1])
        for row in rows
        if second in row["giga_terms_per_second"]
    ]
    return math.exp(statistics.fmean(logs)) if logs else float("nan")


def _hardware(device: str) -> dict[str, Any]:
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
