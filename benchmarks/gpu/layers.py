"""Compare single layers on a GPU: forward pass and both gradients of ours and of torch's convolution."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ..bootstrap import make_importable
from ..cpu.layers import Layer, layers_of
from .timing import Timer, summary

MODELS = ("cifar_resnet20", "resnet18", "resnet50", "mobilenetv2_100")
# dtype and memory format; a convolution in fp32 is also measured with TF32.
MODES = {
    "fp32": (torch.float32, torch.contiguous_format),
    "bf16": (torch.bfloat16, torch.channels_last),
}
COMPILERS = 12


def all_layers(models: tuple[str, ...] = MODELS) -> list[Layer]:
    """Return the layers of the models, each distinct shape once."""
    found: dict[tuple[Any, ...], Layer] = {}
    for model in models:
        for layer in layers_of(model, "cuda"):
            found.setdefault(tuple(layer)[1:], layer)
    return list(found.values())


def functions(layer: Layer, mode: str, device: str) -> dict[str, Callable[[], Any]]:
    """Return the functions to time, by name, on random operands of a layer."""
    from adderkit.adder_layers.ops import adder_conv2d_weight_grad

    dtype, memory_format = MODES[mode]
    x = torch.randn(layer.input, device=device).to(dtype, memory_format=memory_format)
    w = torch.randn(layer.weight, device=device).to(dtype, memory_format=memory_format)
    stride, padding, groups = layer.stride, layer.padding, layer.groups
    pairs = ([stride, stride], [padding, padding], [1, 1])
    output = F.conv2d(x, w, None, stride, padding, 1, groups)
    grad = torch.randn_like(output)
    del output
    adder = torch.ops.adderkit
    timed: dict[str, Callable[[], Any]] = {
        "adder forward": lambda: adder.adder_conv2d(x, w, None, *pairs, groups),
        "adder input grad": lambda: adder.adder_conv2d_input_grad(grad, x, w, *pairs, groups),
        "adder weight grad": lambda: adder_conv2d_weight_grad(grad, x, w, *pairs, groups),
        "conv forward": lambda: F.conv2d(x, w, None, stride, padding, 1, groups),
        "conv input grad": lambda: conv2d_input(x.shape, w, grad, stride, padding, 1, groups),
        "conv weight grad": lambda: conv2d_weight(x, w.shape, grad, stride, padding, 1, groups),
    }
    if mode == "fp32":
        for name in ("adder weight grad", "conv forward", "conv input grad", "conv weight grad"):
            timed[f"{name}, tf32"] = timed[name]
    return timed


def measure(layer: Layer, mode: str, timer: Timer, device: str, limit: float | None) -> dict[str, Any]:
    """Measure milliseconds, giga-terms per second and share of ``limit`` (giga-terms per second) of each function."""
    rows = {}
    for name, function in functions(layer, mode, device).items():
        with tf32(name.endswith("tf32")):
            times = summary(timer(function))
        rate = layer.terms / times["median"] / 1e6
        rows[name] = {"milliseconds": times, "giga_terms_per_second": float(f"{rate:.4g}")}
        if limit and name in ("adder forward", "adder input grad"):
            rows[name]["share_of_issue_limit"] = round(rate / limit, 4)
    return {**layer._asdict(), "mode": mode, "terms": layer.terms, "functions": rows}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set whether fp32 convolutions may round their operands to TF32 inside the context."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compile_all(layers: list[Layer]) -> None:
    """Fill Triton's cache from ``COMPILERS`` parallel processes."""
    context = multiprocessing.get_context("spawn")
    jobs = [(layer, mode) for layer in layers for mode in MODES]
    with ProcessPoolExecutor(COMPILERS, mp_context=context, initializer=make_importable) as pool:
        for future in [pool.submit(compile_one, *job) for job in jobs]:
            future.result()


def compile_one(layer: Layer, mode: str) -> None:
    """Run our kernels of a layer once."""
    for name, function in functions(layer, mode, "cuda").items():
        if name in ("adder forward", "adder input grad"):
            function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return our speed as a multiple of the convolution's, over all layers of each mode."""
    result = {}
    for mode in MODES:
        for kind in ("forward", "input grad", "weight grad"):
            pairs = [
                (row["functions"][f"conv {kind}"]["milliseconds"], row["functions"][f"adder {kind}"]["milliseconds"])
                for row in rows
                if row["mode"] == mode
            ]
            if pairs:
                ratios = torch.tensor([conv["median"] / adder["median"] for conv, adder in pairs])
                result[f"{mode} {kind}, adder / conv"] = round(ratios.log().mean().exp().item(), 4)
    return result
