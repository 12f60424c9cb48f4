"""Compare single quantized layers on a GPU: our kernel on bytes, ours in fp32, and products by tensor cores."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer.plan import Adder, Requantization
from adderkit.adder_layers.integer.triton_launch import operands_of, plan_adder

from ..cpu.layers import Layer
from .timing import Timer, summary

# Bytes of unfolded windows above which the int8 product is omitted.
WINDOWS_LIMIT = 8 << 30


def functions(layer: Layer, device: str) -> dict[str, Callable[[], Any]]:
    """Return the functions to time, by name, on random operands of a layer.

    Torch has no int8 convolution for GPUs: ``product int8`` multiplies windows that are unfolded already, which is less
    work than a convolution. It needs sizes that are multiples of 8, and one group.
    """
    x = torch.randn(layer.input, device=device)
    w = torch.randn(layer.weight, device=device)
    x_half, w_half = (tensor.half().to(memory_format=torch.channels_last) for tensor in (x, w))
    stride, padding, groups = layer.stride, layer.padding, layer.groups
    pairs = ([stride, stride], [padding, padding], [1, 1])
    timed: dict[str, Callable[[], Any]] = {
        "adder uint8": _adder(layer, device),
        "adder fp32": lambda: torch.ops.adderkit.adder_conv2d(x, w, None, *pairs, groups),
        "conv fp16": lambda: F.conv2d(x_half, w_half, None, stride, padding, 1, groups),
    }
    batch, filters, rows, columns = layer.output
    positions, terms = batch * rows * columns, w[0].numel()
    if groups == 1 and terms % 8 == filters % 8 == 0 and positions * terms < WINDOWS_LIMIT:
        windows = torch.randint(-128, 128, (positions, terms), dtype=torch.int8, device=device)
        filters_int8 = torch.randint(-128, 128, (filters, terms), dtype=torch.int8, device=device)
        timed["product int8"] = lambda: torch._int_mm(windows, filters_int8.T)
    return timed


def _adder(layer: Layer, device: str) -> Callable[[], None]:
    """Return the integer engine's step from bytes to requantized bytes, with weights already packed."""

    def random(*shape: int, high: int = 256) -> torch.Tensor:
        return torch.randint(0, high, shape, dtype=torch.uint8, device=device)

    batch, channels, *size = layer.input
    filters, group_channels, *kernel = layer.weight
    window = Window((kernel[0], kernel[1]), *((value, value) for value in (layer.stride, layer.padding, 1)))
    offset = torch.zeros(filters, dtype=torch.int64, device=device)
    factors = Requantization(random(filters).int(), offset, random(filters, high=40), random(filters, high=1))
    step = Adder(0, 1, random(filters, *kernel, group_channels), window, layer.groups, factors)
    operands = operands_of(step, random(channels))
    source = random(batch, *size, channels)
    _, _, rows, columns = layer.output
    output = random(batch, rows, columns, filters)
    where = gpu.device(source.device.index)
    return lambda: plan_adder(step, operands, source, None, output, where).run()


def measure(layer: Layer, timer: Timer, device: str) -> dict[str, Any]:
    """Measure milliseconds and giga-terms per second of each function; a term is a distance or a product."""
    rows = {}
    for name, function in functions(layer, device).items():
        times = summary(timer(function))
        rate = layer.terms / times["median"] / 1e6
        rows[name] = {"milliseconds": times, "giga_terms_per_second": float(f"{rate:.4g}")}
    return {**layer._asdict(), "terms": layer.terms, "functions": rows}


def measure_all(layers: list[Layer], timer: Timer, device: str, seconds: float) -> dict[str, Any]:
    """Measure as many layers as fit into ``seconds``, at least one, and count those that were left out."""
    stop = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for layer in layers:
        if rows and time.monotonic() > stop:
            break
        rows.append(measure(layer, timer, device))
        rates = {name: row["giga_terms_per_second"] for name, row in rows[-1]["functions"].items()}
        print(f"uint8 layer {layer.model} {layer.input} {layer.weight}: {rates}", flush=True)
    return {"layers": rows, "left_out": len(layers) - len(rows)}
