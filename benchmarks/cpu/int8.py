"""Compare whole quantized adder networks on a CPU with the alternatives, interleaved in one run.

    python -m benchmarks.cpu.int8 --json docs/results/int8.json

For every model and batch size: our integer network (best instruction set, and AVX2), ONNX Runtime's int8 (QDQ, per
channel) and fp32 convolutional network of the same architecture, torch's eager fp32 convolutional network, and our fp32
adder network, all on as many threads as torch. Latencies are 20 %, 50 % and 80 % quantiles. Rates are giga-terms per
second, where a term is one difference or product; the limit, measured in the same run, is the rate of the same
operations on registers alone. Weights and calibration images are random, since the time does not depend on them.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import adderkit
from adderkit.adder_layers.integer.cpu_engine import CpuEngine, terms
from adderkit.adder_layers.integer.network import IntegerNetwork
from adderkit.adder_layers.integer.plan import IntegerPlan
from adderkit.adder_layers.integer.record import tensors_of
from adderkit.convert.files import write_json
from adderkit.convert.quantization.quantize import quantize

from ..gpu.issue_limit import issue_limit
from ..timing import hardware, interleaved, peak_bytes, quantiles
from .onnx_int8 import write_fp32, write_int8

CALIBRATION_IMAGES = 16
Run = Callable[[Tensor], Any]
Builders = dict[str, Callable[[], Run]]


def prepare(name: str, folder: Path, sets: list[str]) -> tuple[Builders, dict[str, int], IntegerPlan, int]:
    """Prepare the networks to compare.

    Returns:
        By name, functions that load a network and return it ready to run on ``[N, 3, S, S]`` fp32; the bytes of each
        network's weights; our plan; and the image size ``S``.
    """
    torch.manual_seed(0)
    cnn, adder = timm.create_model(name).eval(), timm.create_model(name).eval()
    adderkit.convert_(adder)
    size = cnn.default_cfg["input_size"][-1]
    quantized = quantize(adder, torch.randn(CALIBRATION_IMAGES, 3, size, size))
    assert isinstance(quantized, IntegerNetwork)
    plan = quantized.plan
    fp32, int8 = folder / f"{name}.onnx", folder / f"{name}_int8.onnx"
    write_fp32(cnn, size, fp32)
    write_int8(fp32, size, int8)
    ours = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_of(plan))
    parameters = sum(4 * parameter.numel() for parameter in cnn.parameters())
    builders: Builders = {f"adder int8, {set_}": _engine(plan, set_) for set_ in sets}
    size_of = dict.fromkeys(builders, ours)
    others: dict[str, tuple[Callable[[], Run], int]] = {
        "ONNX Runtime int8": (lambda: _session(int8), int8.stat().st_size),
        "ONNX Runtime fp32": (lambda: _session(fp32), fp32.stat().st_size),
        "torch fp32": (lambda: _eager(cnn), parameters),
        "adder fp32": (lambda: _eager(adder), parameters),
    }
    builders |= {key: build for key, (build, _) in others.items()}
    return builders, size_of | {key: count for key, (_, count) in others.items()}, plan, size


def _engine(plan: IntegerPlan, instruction_set: str) -> Callable[[], Run]:
    return lambda: CpuEngine(plan, instruction_set).run_float


def _session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def _eager(model: nn.Module) -> Run:
    return torch.inference_mode()(model)


def measure(
    builders: Builders, plan: IntegerPlan, size: int, batch: int, rounds: int, limit: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Measure latency, rate, share of the limit and peak memory of each network at one batch size."""
    images = torch.randn(batch, 3, size, size)
    ready: dict[str, Run] = {}

    def first_call(name: str) -> Callable[[], None]:
        def call() -> None:
            ready[name] = builders[name]()
            ready[name](images)

        return call

    peaks = {name: peak_bytes(first_call(name), "cpu") for name in builders}
    seconds = interleaved({name: _on(run, images) for name, run in ready.items()}, "cpu", rounds, settle=True)
    count = batch * sum(terms(step, plan) for step in plan.steps)
    rows = {}
    for name, values in seconds.items():
        latency = quantiles(values)
        rate = count / latency[1] / 1e9
        row = {"milliseconds": [1e3 * value for value in latency], "giga_terms_per_second": rate}
        reachable = limit.get(name.removeprefix("adder int8, "), {}).get("byte differences")
        rows[name] = row | {"peak_bytes": peaks[name]} | ({"share_of_limit": rate / reachable} if reachable else {})
    return rows


def _on(run: Run, images: Tensor) -> Callable[[], Any]:
    return lambda: run(images)


def profile(plan: IntegerPlan, size: int, repeats: int = 10) -> list[dict[str, Any]]:
    """Profile our network step by step at batch 1; each step has the fastest time of several runs."""
    engine, image = CpuEngine(plan), torch.randint(256, (1, size, size, 3), dtype=torch.uint8)
    runs = [engine.profile(image) for _ in range(repeats)]
    best = [min(rows, key=lambda row: row.seconds) for rows in zip(*runs, strict=True)]
    return [{"path": row.path, "kind": row.kind, "microseconds": 1e6 * row.seconds,
             "giga_terms_per_second": row.giga_terms_per_second} for row in best]  # fmt: skip


def main() -> None:
    """Measure every model, print a line for each network, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--instruction-sets", nargs="+", help="default: the best, and avx2", default=None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    best = adderkit.adder_layers.integer.cpu_engine.available()
    sets = arguments.instruction_sets or [name for name in best if name in (best[0], "avx2")]
    result: dict[str, Any] = {"hardware": hardware("cpu"), "rows": {}, "weight_bytes": {}, "profile": {}}
    limit = {name: issue_limit("cpu", name) for name in sets}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            builders, result["weight_bytes"][name], plan, size = prepare(name, Path(folder), sets)
            for batch in arguments.batches:
                limit = {key: _larger(rates, issue_limit("cpu", key)) for key, rates in limit.items()}
                rows = measure(builders, plan, size, batch, arguments.rounds, limit)
                result["rows"][f"{name}, batch {batch}"] = rows
                for provider, row in rows.items():
                    low, middle, high = row["milliseconds"]
                    share = f", {row['share_of_limit']:.0%} of the limit" if "share_of_limit" in row else ""
                    print(f"{name}, batch {batch}, {provider}: {middle:.2f} ms ({low:.2f} to {high:.2f}), "
                          f"{row['giga_terms_per_second']:.0f} giga-terms/s{share}", flush=True)  # fmt: skip
            result["profile"][name] = profile(plan, size)
            result["issue_limit"] = limit
            if arguments.json is not None:
                write_json(arguments.json, result)  # an interrupted run keeps its results


def _larger(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the higher rates: the clock may have risen since, and the limit is the best that the units did."""
    return {name: max(rate, other[name]) for name, rate in one.items()}


if __name__ == "__main__":
    main()
