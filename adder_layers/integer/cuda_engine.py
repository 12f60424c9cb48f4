"""Run a whole integer plan on a CUDA device: adder layers with Triton kernels, everything else in plain PyTorch.

Steps other than adder layers are exact and short rather than fast. PyTorch has no integer convolution or matrix product
on GPUs, so the first convolution and the classifier run in fp64, which represents every sum of a plan exactly.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from ..backends.triton import launch as gpu
from .check import check_plan
from .plan import Activation, Adder, AveragePool, Convolution, IntegerPlan, Linear, MaxPool, Rescale, Step, last_use
from .reference import quantize, requantize
from .triton_launch import operands_of, plan_adder


class CudaEngine:
    """A plan on a CUDA device; its results are bit-identical to those of ``reference.run``.

    Args:
        plan: The network.
        device: A CUDA device, or the CPU if Triton's interpreter runs the kernels or the plan needs none.

    Raises:
        ImportError: Triton is not installed.
        ValueError: The plan is inconsistent or could overflow.
    """

    def __init__(self, plan: IntegerPlan, device: torch.device | str) -> None:
        if not gpu.available():
            raise ImportError(
                "Triton is not installed, expected it for quantized networks on a GPU: pip install triton"
            )
        check_plan(plan)
        self.plan: IntegerPlan = on_device(plan, torch.device(device))
        self._operands = {
            step.output: operands_of(step, self.plan.activations[step.input].zero_point)
            for step in self.plan.steps
            if isinstance(step, Adder)
        }
        self._last_use = last_use(plan)

    def run(self, image: Tensor) -> Tensor:
        """Run images through the network.

        Args:
            image: ``[N, H, W, C]`` uint8 on the engine's device.

        Returns:
            int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.

        Raises:
            TypeError: The image is not uint8.
            ValueError: The image does not have the shape that the plan expects, or is on another device.
        """
        first = self.plan.activations[0]
        if image.dtype != torch.uint8:
            raise TypeError(f"image has dtype {image.dtype}, expected {torch.uint8}; run_float takes real values")
        self._check(image, (first.height, first.width, first.channels))
        values = {0: image.contiguous()}
        for index, step in enumerate(self.plan.steps):
            result = self._run_step(step, values).contiguous()
            if not isinstance(step, Linear):
                values[step.output] = result
            values = {number: value for number, value in values.items() if self._last_use.get(number, -1) > index}
        return result

    def run_float(self, images: Tensor) -> Tensor:
        """Quantize images as ``reference.quantize`` does and run them through the network.

        Args:
            images: ``[N, C, H, W]``, floating point, on the engine's device.

        Returns:
            int32 logits ``[N, classes]``, or the bytes ``[N, H, W, C]`` that the last step writes.

        Raises:
            TypeError: The images are not floating point.
            ValueError: The images do not have the size that the plan expects, or are on another device.
        """
        first = self.plan.activations[0]
        if not images.dtype.is_floating_point:
            raise TypeError(f"image has dtype {images.dtype}, expected floating point; run takes bytes")
        self._check(images, (first.channels, first.height, first.width))
        return self.run(quantize(images, first.scale, first.zero_point))

    def _check(self, images: Tensor, shape: tuple[int, int, int]) -> None:
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"image has shape {tuple(images.shape)}, expected [N, {', '.join(map(str, shape))}]")
        expected = self.plan.activations[0].zero_point.device
        if images.device != expected:
            raise ValueError(f"image is on {images.device}, expected {expected}, where the engine is")

    def _run_step(self, step: Step, values: dict[int, Tensor]) -> Tensor:
        source, before = values[step.input], self.plan.activations[step.input]
        match step:
            case Adder():
                return self._adder(step, values)
            case Convolution():
                return requantize(convolution_sums(source, step, before.zero_point), step.requantization, values)
            case AveragePool():
                return requantize(window_sums(source, step), step.requantization, values)
            case Rescale():
                return requantize(source.long(), step.requantization, values)
            case MaxPool():
                return max_pool(source, step, self.plan.activations[step.output])
            case Linear():
                sums = (source.flatten(1).double() @ step.weight.double().T).long()
                return ((sums * step.multiplier + step.offset) >> step.shift).to(torch.int32)
            case _:
                assert_never(step)

    def _adder(self, step: Adder, values: dict[int, Tensor]) -> Tensor:
        target, source = self.plan.activations[step.output], values[step.input]
        output = source.new_empty(len(source), target.height, target.width, target.channels)
        number = step.requantization.residual
        with torch.cuda.device_of(source):
            where = gpu.device(source.device.index)
            for images in gpu.parts(len(source), target.height * target.width):
                residual = None if number is None else values[number][images]
                operands = self._operands[step.output]
                plan_adder(step, operands, source[images], residual, output[images], where).run()
        return output


def on_device(part: Any, device: torch.device) -> Any:
    """Return a plan, or a part of one, with all its tensors on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if type(part) is tuple:
        return tuple(on_device(item, device) for item in part)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{name: on_device(item, device) for name, item in fields.items()})
    return part


def convolution_sums(source: Tensor, step: Convolution, zero_point: Tensor) -> Tensor:
    """Compute ``Σ q·w`` as ``Σ (q - zero_point)·w + Σ zero_point·w``, whose padding is 0: ``[N, H', W', O]`` int64.

    The sums are rounded, since cuDNN may choose an algorithm whose intermediate results are not integers.
    """
    _, stride, padding, dilation = step.window
    centered = (source.double() - zero_point).permute(0, 3, 1, 2)
    weight = step.weight.double().permute(0, 3, 1, 2)
    sums = F.conv2d(centered, weight, None, stride, padding, dilation, step.groups).permute(0, 2, 3, 1)
    zeros = zero_point.long().view(step.groups, 1, -1).expand(-1, len(weight) // step.groups, -1).flatten(0, 1)
    return sums.round().long() + (step.weight.long().sum((1, 2)) * zeros).sum(1)


def window_sums(source: Tensor, step: AveragePool) -> Tensor:
    """Sum the bytes of each window: ``[N, H', W', C]`` int64."""
    kernel, stride, *_ = step.window
    pooled = F.avg_pool2d(source.double().permute(0, 3, 1, 2), kernel, stride, divisor_override=1)
    return pooled.permute(0, 2, 3, 1).long()


def max_pool(source: Tensor, step: MaxPool, output: Activation) -> Tensor:
    """Pool to bytes ``[N, H', W', C]``; half precision represents them, and a padding below all of them."""
    kernel, stride, padding, dilation = step.window
    # Below and to the right also what an output size rounded up needs.
    sizes, inputs = (output.height, output.width), source.shape[1:3]
    ends = [
        max((size - 1) * by + (taps - 1) * apart + 1 - before - present, 0)
        for size, by, taps, apart, before, present in zip(sizes, stride, kernel, dilation, padding, inputs, strict=True)
    ]
    padded = F.pad(source.permute(0, 3, 1, 2).half(), (padding[1], ends[1], padding[0], ends[0]), value=-1.0)
    pooled = F.max_pool2d(padded, kernel, stride, 0, dilation)[:, :, : output.height, : output.width]
    return pooled.permute(0, 2, 3, 1).to(torch.uint8)
