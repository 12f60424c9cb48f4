"""``adderkit bench``: how long a forward pass takes, and of an integer network also each of its steps."""

import dataclasses
import statistics
import time
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from ...adder_layers.integer.cpu_engine import Engine, StepTime
from ...adder_layers.integer.network import IntegerNetwork
from ...convert.errors import AdderkitError
from ...convert.graph.layers import input_size
from ...convert.graph.modes import eval_mode
from ...convert.model_source import build_model, is_folder

_LEAST_RUNS, _MOST_RUNS, _SECONDS = 5, 200, 10.0


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Latencies of forward passes of one batch in milliseconds: as fast as 20, 50 and 80 % of them.

    ``steps`` is the profile of one pass of an integer network.
    """

    model: str
    batch_size: int
    threads: int
    runs: int
    p20: float
    p50: float
    p80: float
    images_per_second: float
    steps: tuple[StepTime, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return dataclasses.asdict(self)


@torch.no_grad()
def run_bench(name: str, batch_size: int, *, profile: bool = False) -> BenchResult:
    """Time forward passes on random images, on the CPU, with as many threads as torch has.

    Args:
        name: Saved folder, or a timm name, which is built without weights.
        batch_size: Images in a pass.
        profile: Also time each step; only for integer networks.

    Raises:
        AdderkitError: The model cannot be had, or has no steps to profile.
    """
    model = build_model(name, pretrained=is_folder(name))
    if profile and not isinstance(model, IntegerNetwork):
        raise AdderkitError(f"{name} is not quantized, expected an integer network for --profile: adderkit quantize")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *input_size(model), generator=generator)
    seconds: list[float] = []
    with eval_mode(model):
        model(images)  # engines and caches are made with the first
        begun = time.perf_counter()
        while len(seconds) < _LEAST_RUNS or (len(seconds) < _MOST_RUNS and time.perf_counter() - begun < _SECONDS):
            started = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - started)
    steps: tuple[StepTime, ...] = ()
    if profile and isinstance(model, IntegerNetwork):
        steps = profiled(model, batch_size)
    p20, p50, p80 = (1e3 * statistics.quantiles(seconds, n=10, method="inclusive")[index] for index in (1, 4, 7))
    rate = 1e3 * batch_size / p50
    return BenchResult(name, batch_size, torch.get_num_threads(), len(seconds), p20, p50, p80, rate, steps)


def profiled(model: IntegerNetwork, batch_size: int) -> tuple[StepTime, ...]:
    """Seconds of each step in one pass over random bytes.

    Raises:
        AdderkitError: The C++ engine is not there.
    """
    first = model.plan.activations[0]
    size = (batch_size, first.height, first.width, first.channels)
    generator = torch.Generator().manual_seed(0)
    try:
        return tuple(Engine(model.plan).profile(torch.randint(0, 256, size, generator=generator).to(torch.uint8)))
    except RuntimeError as error:
        raise AdderkitError(str(error)) from error


def bench_tables(result: BenchResult) -> list[Table]:
    """Latencies, and the profile where there is one."""
    title = f"batch of {result.batch_size}, {result.threads} threads, {result.runs} passes"
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    for column in ("p20 ms", "p50 ms", "p80 ms", "images/s"):
        table.add_column(column, justify="right")
    cells = (f"{each:.2f}" for each in (result.p20, result.p50, result.p80))
    table.add_row(escape(result.model), *cells, f"{result.images_per_second:,.1f}")
    if not result.steps:
        return [table]
    steps = Table(title="one pass, step by step", title_justify="left")
    for column in ("layer", "kind"):
        steps.add_column(column)
    for column in ("ms", "share", "giga-terms/s"):
        steps.add_column(column, justify="right")
    total = sum(step.seconds for step in result.steps)
    for step in result.steps:
        rate = f"{step.giga_terms_per_second:.1f}" if step.giga_terms_per_second else ""
        share = f"{100 * step.seconds / total:.1f} %"
        steps.add_row(escape(step.path) or "(image)", step.kind, f"{1e3 * step.seconds:.3f}", share, rate)
    return [steps, table]
