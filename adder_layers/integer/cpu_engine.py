"""Run plans with the C++ executor (csrc/integer/network.cpp); results are bit-identical to ``reference.py``."""

import dataclasses
import os

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..backends import cpu
from . import reference
from .check import check_plan
from .plan import Adder, AveragePool, Convolution, IntegerPlan, Linear, MaxPool, Rescale, Step


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Time of one step.

    Args:
        path: Path of the layer in the model.
        kind: Kind of the step; that of the first entry is ``read``, for copying or quantizing the images.
        seconds: Time for all images together.
        giga_terms_per_second: Rate of differences or products; 0 for steps without any, and for an empty batch.
    """

    path: str
    kind: str
    seconds: float
    giga_terms_per_second: float


class CpuEngine:
    """A plan that is ready to run on the CPU; any number of threads may call it at the same time.

    It uses as many threads as PyTorch does. Without the C++ extension, or with ``ADDERKIT_CPU=torch``, it runs the
    reference implementation, which is hundreds of times slower.

    Args:
        plan: The network; it is checked.
        instruction_set: One of ``available()`` or ``"torch"``; by default the value of ``ADDERKIT_CPU``, or the best
            one.

    Raises:
        ValueError: The plan is inconsistent or could overflow, or the instruction set is not available.
    """

    def __init__(self, plan: IntegerPlan, instruction_set: str | None = None) -> None:
        check_plan(plan)
        self.plan = plan
        asked = (os.environ.get(cpu.VARIABLE, ""), cpu.VARIABLE)
        if instruction_set is not None:
            asked = (instruction_set, "instruction_set")
        self.instruction_set = cpu.choose(tuple(cpu.integer_available()), *asked)
        self._network = None
        if self.instruction_set is not None:
            from .cpu_network import build_network  # needs the C++ extension

            self._network = build_network(plan, self.instruction_set)

    def run(self, image: Tensor) -> Tensor:
        """Run images through the network.

        Args:
            image: ``[N, H, W, C]`` uint8.

        Returns:
            int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.

        Raises:
            TypeError: The images are not uint8.
            ValueError: The images do not have the size that the plan expects, or are not in CPU memory.
        """
        self._check_bytes(image)
        if self._network is None:
            return reference.run(self.plan, image)
        return self._run(image.contiguous(), None)

    def run_float(self, images: Tensor) -> Tensor:
        """Quantize images as ``reference.quantize`` does and run them through the network.

        Args:
            images: ``[N, C, H, W]``, floating point.

        Returns:
            int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.

        Raises:
            TypeError: The images are not floating point.
            ValueError: The images do not have the size that the plan expects, or are not in CPU memory.
        """
        first = self.plan.activations[0]
        if not images.dtype.is_floating_point:
            raise TypeError(f"image has dtype {images.dtype}, expected floating point; run takes bytes")
        _check_shape(images, (first.channels, first.height, first.width))
        if self._network is None:
            return reference.run(self.plan, reference.quantize(images, first.scale, first.zero_point))
        return self._run(images.float().contiguous(), None)

    def profile(self, image: Tensor) -> list[StepTime]:
        """Run images and return the time and the rate of each step.

        Args:
            image: ``[N, H, W, C]`` uint8.

        Raises:
            RuntimeError: The engine runs the reference implementation, which is not measured.
            TypeError: The images are not uint8.
            ValueError: The images do not have the size that the plan expects, or are not in CPU memory.
        """
        self._check_bytes(image)
        if self._network is None:
            raise RuntimeError(
                "the engine runs the reference implementation, which has no profile; install adderkit with a compiler"
            )
        seconds = torch.zeros(len(self.plan.steps) + 1, dtype=torch.float64)
        self._run(image.contiguous(), seconds)
        rows = [StepTime("", "read", float(seconds[0]), 0.0)]
        for step, path, time in zip(self.plan.steps, self.plan.paths, seconds[1:].tolist(), strict=True):
            rate = len(image) * terms(step, self.plan) / time / 1e9 if time else 0.0  # an empty batch takes none
            rows.append(StepTime(path, step.kind, time, rate))
        return rows

    def _check_bytes(self, image: Tensor) -> None:
        first = self.plan.activations[0]
        if image.dtype != torch.uint8:
            raise TypeError(f"image has dtype {image.dtype}, expected {torch.uint8}; run_float takes real values")
        _check_shape(image, (first.height, first.width, first.channels))

    def _run(self, images: Tensor, seconds: Tensor | None) -> Tensor:
        last = self.plan.steps[-1]
        if isinstance(last, Linear):
            output = torch.empty(len(images), len(last.offset), dtype=torch.int32)
        else:
            result = self.plan.activations[last.output]
            output = torch.empty(len(images), result.height, result.width, result.channels, dtype=torch.uint8)
        if len(images) == 0:
            return output
        assert self._network is not None
        threads = torch.get_num_threads()
        if images.dtype == torch.uint8:
            self._network.run(images, output, threads=threads, seconds=seconds)
        else:
            reciprocal = 1 / self.plan.activations[0].scale
            self._network.run_float(images, output, scale_reciprocal=reciprocal, threads=threads)
        return output


def available() -> list[str]:
    """Return the instruction sets of this build that this machine runs, best first; none without the extension."""
    return cpu.integer_available()


def terms(step: Step, plan: IntegerPlan) -> int:
    """Return how many differences or products a step computes for one image; 0 without weights."""
    match step:
        case Adder() | Convolution():
            output = plan.activations[step.output]
            return step.weight.numel() * output.height * output.width
        case Linear():
            return step.weight.numel()
        case AveragePool() | Rescale() | MaxPool():
            return 0
        case _:
            assert_never(step)


def _check_shape(images: Tensor, shape: tuple[int, int, int]) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise ValueError(f"image has shape {tuple(images.shape)}, expected [N, {', '.join(map(str, shape))}]")
    if images.device.type != "cpu":
        raise ValueError(f"image is on {images.device}, expected cpu, where the integer engine runs")
