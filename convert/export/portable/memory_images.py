"""Write a quantized network as memory images for hardware test benches: ``$readmemh`` files and a manifest.

Each file holds one array, with one word per line and the last dimension fastest. Words are hexadecimal, as wide as the
array's dtype, with negative numbers in two's complement (IEEE 1364, ``$readmemh``).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from typing_extensions import assert_never

from ....adder_layers.geometry import Window
from ....adder_layers.integer.plan import (
    Adder,
    AveragePool,
    Convolution,
    IntegerPlan,
    Linear,
    MaxPool,
    Rescale,
    Step,
    requantization_of,
    step_tensors,
)
from ....adder_layers.integer.reference import trace
from .inputs import Normalization, check_inputs

_FORMULA = {
    "total": "t = a * multiplier[c] + r * residual_multiplier[c] + offset[c], int64; r is the residual's byte",
    "byte": "q = min(max(t, 0) >> shift[c], quant_max) << scale_exponent[c]",
    "pixel": "q = floor((p / 255 - mean[c]) / std[c] / scale + zero_point[c] + 1/2), clamped, for p from 0 to 255",
    "real": "scale * (q - zero_point[c]); adder layers and convolutions read zero_point[c] at padded taps",
    "window": "tap (i, j) of output pixel (y, x) is input pixel (y * stride + i * dilation - padding, likewise for x)",
    "groups": "filter o reads channels g * C to g * C + C - 1, with g = o / (filters / groups) and C of weight",
}
_LINES = 4096


def memory_images(
    plan: IntegerPlan, image: Tensor, pixels: Normalization
) -> tuple[dict[str, Any], dict[str, Iterable[str]]]:
    """Write a network, and its activations and outputs for one image, as memory images.

    Args:
        plan: The network.
        image: Bytes ``[H, W, C]`` uint8.
        pixels: Normalization of the images, for the manifest.

    Returns:
        The manifest, JSON-ready, and the text of each file that it names, generated piece by piece.

    Raises:
        ExportError: The plan is inconsistent or could overflow, or the image has another size.
    """
    check_inputs(plan, "image is", image)
    values, output = trace(plan, image[None])
    files: dict[str, Iterable[str]] = {}

    def entry(name: str, values: Tensor, dimensions: str) -> dict[str, Any]:
        files[f"{name}.hex"] = hex_lines(values)
        return {
            "file": f"{name}.hex",
            "dimensions": dimensions,
            "shape": list(values.shape),
            "bits": 8 * values.element_size(),
            "signed": values.dtype.is_signed,
        }

    activations = [
        {
            "number": number,
            "scale": activation.scale,
            "bytes": entry(f"activation_{number:03}", values[number][0], "HWC"),
            "zero_point": entry(f"activation_{number:03}_zero_point", activation.zero_point, "C"),
        }
        for number, activation in enumerate(plan.activations)
    ]
    steps = []
    for index, (step, path) in enumerate(zip(plan.steps, plan.paths, strict=True)):
        arrays = {
            name: entry(f"step_{index:03}_{name}", tensor, _dimensions(tensor))
            for name, tensor in step_tensors(step).items()
        }
        steps.append({"index": index, "path": path} | _describe(step) | {"arrays": arrays})
    manifest = {
        "format": 1,
        "formula": _FORMULA,
        "normalization": dataclasses.asdict(pixels),
        "activations": activations,
        "steps": steps,
    }
    if isinstance(plan.steps[-1], Linear):
        manifest["logits"] = {"scale": plan.steps[-1].scale} | entry("logits", output[0], "O")
    return manifest, files


def hex_lines(values: Tensor) -> Iterator[str]:
    """Yield numbers as hexadecimal words, one per line."""
    width = values.element_size()
    for part in values.flatten().split(_LINES):
        big_endian = part.numpy().astype(part.numpy().dtype.newbyteorder(">"))
        yield big_endian.tobytes().hex("\n", width) + "\n"


def _dimensions(tensor: Tensor) -> str:
    return {1: "O", 2: "O(HWC)", 4: "OHWC", 5: "OTHWC"}[tensor.ndim]


def _describe(step: Step) -> dict[str, Any]:
    """Return the entry of a step without its arrays."""
    found: dict[str, Any] = {"kind": step.kind, "formula": "", "input": step.input}
    match step:
        case Adder():
            found["formula"] = "a[o] = sum |q - weight[o]| over a window"
            if step.terms > 1:
                found["formula"] = "a[o] = sum over terms j of (sum |q - weight[o][j]| over a window) << terms - 1 - j"
                found["terms"] = step.terms
            found |= {"output": step.output, **_window(step.window), "groups": step.groups}
        case Convolution():
            found["formula"] = "a[o] = sum q * weight[o] over a window"
            found |= {"output": step.output, **_window(step.window), "groups": step.groups}
        case Rescale():
            found["formula"] = "a[c] = q"
            found["output"] = step.output
        case MaxPool():
            found["formula"] = "the largest q of a window, ignoring padded taps, is the output byte"
            found |= {"output": step.output, **_window(step.window)}
        case AveragePool():
            found["formula"] = "a[c] = sum q over a window"
            found |= {"output": step.output, **_window(step.window)}
        case Linear():
            found["formula"] = (
                "logit[o] = (sum q * weight[o] * multiplier[o] + offset[o]) >> shift[o], rounded down, int32"
            )
        case _:
            assert_never(step)
    requantization = requantization_of(step)
    if requantization is not None:
        found |= {"quant_max": requantization.quant_max, "residual": requantization.residual}
    return found


def _window(window: Window) -> dict[str, list[int]]:
    return {name: list(pair) for name, pair in window._asdict().items()}
