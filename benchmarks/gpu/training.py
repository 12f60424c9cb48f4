"""Compare whole training steps of adder network and CNN on a GPU: milliseconds, images per second, memory."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..timing import peak_bytes
from .timing import captured, summary

WARM_UP, STEPS = 3, 15


class Case(NamedTuple):
    """Model and settings of a training step; ``image`` is the size of its square input."""

    model: str
    batch: int
    image: int
    mode: str = "fp32"


CASES = (Case("cifar_resnet20", 256, 32), Case("resnet50", 128, 224), Case("resnet50", 128, 224, "bf16"))


def training_step(case: Case, adder: bool, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a step of SGD on random images, and its forward and backward pass alone."""
    import adderkit

    model: nn.Module = timm.create_model(case.model)
    if adder:
        adderkit.convert_(model)
    model = model.to(device).train()
    images = torch.randn(case.batch, 3, case.image, case.image, device=device)
    if case.mode == "bf16":
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    labels = torch.zeros(case.batch, dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if adder:
        adderkit.AdaptiveRate(optimizer, model)
    precision: Callable[[], Any] = contextlib.nullcontext
    if case.mode == "bf16":
        precision = lambda: torch.autocast(torch.device(device).type, torch.bfloat16)  # noqa: E731

    def forward_and_backward() -> None:
        with precision():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    def step() -> None:
        optimizer.zero_grad()
        forward_and_backward()
        optimizer.step()

    return step, forward_and_backward


def measure(case: Case, device: str, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Measure the step as called and, on a GPU, captured as a graph; and the memory of forward and backward pass."""
    result: dict[str, Any] = case._asdict()
    for name in ("cnn", "adder"):
        step, forward_and_backward = training_step(case, name == "adder", device)
        times = _timed(step, synchronize)
        result[name] = {"milliseconds": summary(times)}
        if device == "cuda":
            # Memory above that before the call, gradients included: saved tensors of the backward pass, temporaries.
            result[name]["peak_bytes"] = peak_bytes(forward_and_backward, device)
            replay = captured(step)
            result[name]["captured_milliseconds"] = summary(_timed(replay, synchronize)) if replay else None
            del replay
        result[name]["images_per_second"] = round(1e3 * case.batch / result[name]["milliseconds"]["median"], 1)
        del step, forward_and_backward
        if device == "cuda":
            torch.cuda.empty_cache()
    if device == "cuda":
        result["peak_ratio"] = round(result["adder"]["peak_bytes"] / result["cnn"]["peak_bytes"], 4)
    result["time_ratio"] = round(result["adder"]["milliseconds"]["median"] / result["cnn"]["milliseconds"]["median"], 3)
    return result


def _timed(step: Callable[[], None], synchronize: Callable[[], None]) -> list[float]:
    times = []
    for index in range(WARM_UP + STEPS):
        started = time.perf_counter()
        step()
        synchronize()
        if index >= WARM_UP:
            times.append((time.perf_counter() - started) * 1e3)
    return times
