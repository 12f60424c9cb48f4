"""``adderkit bench``: time a model's forward pass, and each step of an integer network."""

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..terminal.options import BatchSize, Device, Json
from ..terminal.output import print_json

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ...adder_layers.integer.cpu_engine import StepTime
    from ...adder_layers.integer.network import IntegerNetwork

_LEAST_RUNS, _MOST_RUNS, _SECONDS = 5, 200, 10.0


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Saved folder, or timm model name to build without weights.")
    ],
    batch_size: BatchSize = 1,
    device: Device = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also time each step of an integer network.")] = False,
    json: Json = False,
) -> None:
    """Time the forward pass of a model."""
    from ..terminal.tables import show

    result = run_bench(model, batch_size, profile=profile, device=device)
    if json:
        print_json(result.to_dict())
    else:
        show(*bench_tables(result))


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """Latencies of forward passes of one batch in milliseconds: their 20th, 50th and 80th percentiles.

    ``steps`` is the profile of one pass of an integer network.
    """

    model: str
    batch_size: int
    device: str
    threads: int
    runs: int
    p20: float
    p50: float
    p80: float
    images_per_second: float
    steps: "tuple[StepTime, ...]" = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return dataclasses.asdict(self)


def run_bench(name: str, batch_size: int, *, profile: bool = False, device: str | None = None) -> BenchResult:
    """Time forward passes on random images; on the CPU, with torch's current number of threads.

    Args:
        name: Saved folder, or a timm name, which is built without weights.
        batch_size: Images per forward pass.
        profile: Also time each step; only for integer networks on the CPU.
        device: Device to compute on; by default the GPU, if there is one.

    Raises:
        AdderkitError: The model cannot be loaded, or has no steps to profile.
    """
    import statistics

    import torch

    from ...adder_layers.integer.network import IntegerNetwork
    from ...convert.errors import AdderkitError
    from ...convert.graph.layers import input_size
    from ...convert.model_source import ModelSource
    from ..distributed.device import compute_device
    from ..runs.plan import device_name

    source = ModelSource(name)
    model = source.build(weights=source.folder is not None)
    if profile and not isinstance(model, IntegerNetwork):
        raise AdderkitError(
            f"{name} is not quantized, which --profile needs; first: adderkit quantize {name} --dataset NAME"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *input_size(model), generator=generator)
    with compute_device("cpu" if profile and device is None else device) as place:
        if profile and place.type != "cpu":
            raise AdderkitError(f"--device is {device}, expected cpu: --profile times the steps of the CPU engine")
        seconds = _latencies(model.to(place), images.to(place))
        steps = profiled(model, batch_size) if profile and isinstance(model, IntegerNetwork) else ()
        where = device_name(place)
    p20, p50, p80 = (1e3 * statistics.quantiles(seconds, n=10, method="inclusive")[index] for index in (1, 4, 7))
    rate = 1e3 * batch_size / p50
    return BenchResult(name, batch_size, where, torch.get_num_threads(), len(seconds), p20, p50, p80, rate, steps)


def _latencies(model: "nn.Module", images: "Tensor") -> list[float]:
    """Return the seconds of forward passes, repeated until enough of them or enough time have passed.

    Args:
        model: The model.
        images: ``[N, C, H, W]`` on the model's device.
    """
    import torch

    from ...convert.graph.modes import eval_mode

    seconds: list[float] = []
    with torch.no_grad(), eval_mode(model):
        model(images).cpu()  # the first pass creates engines and caches
        begun = time.perf_counter()
        while len(seconds) < _LEAST_RUNS or (len(seconds) < _MOST_RUNS and time.perf_counter() - begun < _SECONDS):
            started = time.perf_counter()
            model(images).cpu()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return seconds


def profiled(model: "IntegerNetwork", batch_size: int) -> "tuple[StepTime, ...]":
    """Time each step in one pass over random bytes.

    Raises:
        AdderkitError: The C++ engine is not available.
    """
    import torch

    from ...adder_layers.integer.cpu_engine import CpuEngine
    from ...convert.errors import AdderkitError

    first = model.plan.activations[0]
    size = (batch_size, first.height, first.width, first.channels)
    generator = torch.Generator().manual_seed(0)
    try:
        return tuple(CpuEngine(model.plan).profile(torch.randint(0, 256, size, generator=generator).to(torch.uint8)))
    except RuntimeError as error:
        raise AdderkitError(str(error)) from error


def bench_tables(result: BenchResult) -> "list[Table]":
    """Tables of the profile, if there is one, and of the latencies."""
    from rich.markup import escape

    from ..terminal.tables import new_table

    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    title = f"batch of {result.batch_size} on {result.device}{threads}, {result.runs} passes"
    table = new_table(title, ("model",), ("p20 ms", "p50 ms", "p80 ms", "images/s"))
    cells = (f"{each:.2f}" for each in (result.p20, result.p50, result.p80))
    table.add_row(escape(result.model), *cells, f"{result.images_per_second:,.1f}")
    if not result.steps:
        return [table]
    steps = new_table("profile of one pass", ("layer", "kind"), ("ms", "share", "giga-terms/s"))
    total = sum(step.seconds for step in result.steps)
    for step in result.steps:
        rate = f"{step.giga_terms_per_second:.1f}" if step.giga_terms_per_second else ""
        share = f"{100 * step.seconds / total:.1f} %"
        steps.add_row(escape(step.path) or "(image)", step.kind, f"{1e3 * step.seconds:.3f}", share, rate)
    return [steps, table]
