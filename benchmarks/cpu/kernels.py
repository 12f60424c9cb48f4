"""Compare the adder kernels with the alternatives, layer by layer, interleaved in one run.

    python -m benchmarks.cpu.kernels --device cpu --json docs/results/kernels_cpu.json

For every distinct convolution of the models: forward, input gradient and training step (forward and both gradients)
of our operator, of ``F.conv2d``, of ``torch.cdist(p=1)`` on unfolded input, and of the published formulation where it
needs less than 8 GB. Rates are giga-terms per second, where a term is one ``|x - w|``, or one product for the
convolution: medians with 20 % and 80 % quantiles, and the share of the arithmetic units' limit. Also the peak memory of
the training step, and at the end the time of a training step of the whole `cifar_resnet20`.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adderkit
from adderkit.convert.files import write_json

from ..gpu.issue_limit import issue_limit
from ..timing import hardware, interleaved, peak_bytes, quantiles
from .layers import CIFAR_BATCH, Layer, layers_of, providers

PASSES = ("forward", "input gradient", "training step")
# How many times the forward pass's terms a pass computes: a training step has the output and two gradients.
PASS_TERMS = {"forward": 1, "input gradient": 1, "training step": 3}


def measure_layer(layer: Layer, device: str, rounds: int) -> dict[str, Any]:
    """Measure one row of the result: rates by provider and pass, and peak memory of the training step."""
    x = torch.randn(layer.input, device=device, requires_grad=True)
    w = torch.randn(layer.weight, device=device, requires_grad=True)
    computed = providers(layer)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in computed}
    for pass_ in PASSES:
        timed = {name: _pass(function, pass_, x, w) for name, function in computed.items()}
        for name, seconds in interleaved(timed, device, rounds).items():
            rates[name][pass_] = quantiles([PASS_TERMS[pass_] * layer.terms / value / 1e9 for value in seconds])
    peaks = {name: peak_bytes(_pass(function, "training step", x, w), device) for name, function in computed.items()}
    return {**layer._asdict(), "terms": layer.terms, "giga_terms_per_second": rates, "peak_bytes": peaks}


def _pass(function: Callable[[Tensor, Tensor], Tensor], pass_: str, x: Tensor, w: Tensor) -> Callable[[], Any]:
    if pass_ == "forward":
        return torch.no_grad()(lambda: function(x, w))
    if pass_ == "input gradient":
        output = function(x, w.detach())
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, x, grad, retain_graph=True)

    def training_step() -> Any:
        output = function(x, w)
        return torch.autograd.grad(output, (x, w), torch.ones_like(output))

    return training_step


def measure_network(device: str, rounds: int) -> dict[str, list[float]]:
    """Measure seconds of a training step of `cifar_resnet20` as CNN and as adder network, in fp32."""
    images = torch.randn(CIFAR_BATCH[device], 3, 32, 32, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    networks = {"conv": timm.create_model("cifar_resnet20"), "adder": timm.create_model("cifar_resnet20")}
    adderkit.convert_(networks["adder"])
    timed = {name: _training_step(network.to(device).train(), images, labels) for name, network in networks.items()}
    return {name: quantiles(seconds) for name, seconds in interleaved(timed, device, rounds).items()}


def _training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure every layer, print a table and the geometric means, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet18", "mobilenetv2_100", "cifar_resnet20"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device, rows = arguments.device, []
    result: dict[str, Any] = {"hardware": hardware(device), "issue_limit": issue_limit(device)}
    for layer in (layer for name in arguments.models for layer in layers_of(name, device)):
        rows.append(measure_layer(layer, device, arguments.rounds))
        print(_line(rows[-1]), flush=True)
        _write(arguments.json, {**result, "rows": rows})  # an interrupted run keeps its results
    network = measure_network(device, arguments.rounds)
    print("training step of cifar_resnet20: " + ", ".join(f"{name} {time[1]:.3f} s" for name, time in network.items()))
    # The clock may have risen since; the limit is the best that the units did.
    again = issue_limit(device)
    limit = {name: max(rate, again[name]) for name, rate in result["issue_limit"].items()}
    summary = {name: summarize([row for row in rows if row["model"] == name], limit) for name in arguments.models}
    resnets = [row for row in rows if row["model"] in ("resnet18", "resnet50")]
    summary |= {"resnet18 and resnet50": summarize(resnets, limit)} if resnets else {}
    for name, means in summary.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in means.items()))
    result |= {"issue_limit": limit, "summary": summary, "training_step": network}
    _write(arguments.json, {**result, "rows": rows})


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, result)


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['model']} {row['input']} {row['weight']} s{row['stride']} g{row['groups']}"
    rates = row["giga_terms_per_second"]
    return f"{shape}: " + "; ".join(
        f"{pass_} " + " ".join(f"{name} {rate[pass_][1]:.1f}" for name, rate in rates.items()) for pass_ in PASSES
    )


def summarize(rows: list[dict[str, Any]], limit: dict[str, float]) -> dict[str, float]:
    """Return geometric means over layers of ratios of median rates, and of shares of the arithmetic units' limit."""
    means = {}
    for other in ("conv", "cdist", "published"):
        for pass_ in PASSES:
            ratios = [_median(row, "adder", pass_) / _median(row, other, pass_) for row in rows if _has(row, other)]
            if ratios:
                means[f"adder / {other}, {pass_}"] = _geometric_mean(ratios)
    for pass_ in PASSES[:2]:
        if pass_ in limit:
            means[f"share of the limit, {pass_}"] = _geometric_mean(
                [_median(row, "adder", pass_) / limit[pass_] for row in rows]
            )
    return means


def _has(row: dict[str, Any], provider: str) -> bool:
    return provider in row["giga_terms_per_second"]


def _median(row: dict[str, Any], provider: str, pass_: str) -> float:
    value: float = row["giga_terms_per_second"][provider][pass_][1]
    return value


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


if __name__ == "__main__":
    main()
