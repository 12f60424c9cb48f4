"""A quantized network as memory images for test benches of hardware: ``$readmemh`` files and a manifest.

A file holds one array, one word to a line, the last dimension fastest. A word has the array's width in hexadecimal
digits, negative numbers in two's complement (IEEE 1364, ``$readmemh``).
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ....adder_layers.integer.plan import IntegerPlan, Linear, Rescale, Step, requantization_of, step_tensors
from ....adder_layers.integer.reference import trace
from .checks import check_exportable, check_images
from .pixels import Normalization

_SUMS = {
    "adder": "a[o] = sum |q - weight[o]| over a window",
    "convolution": "a[o] = sum q * weight[o] over a window",
    "rescale": "a[c] = q",
    "max_pool": "the largest q of a window; padded taps do not count; written as it is",
    "average_pool": "a[c] = sum q over a window",
    "linear": "logit[o] = (sum q * weight[o] * multiplier[o] + offset[o]) >> shift[o], rounded down, int32",
}
_FORMULA = {
    "total": "t = a * multiplier[c] + r * residual_multiplier[c] + offset[c], int64; r is the residual's byte",
    "byte": "q = min(max(t, 0) >> shift[c], levels) << exponent[c]",
    "pixel": "of p, 0 to 255: q = floor((p / 255 - mean[c]) / std[c] / scale + zero[c] + 1/2), clamped",
    "real": "scale * (q - zero[c]); an adder layer or convolution reads zero[c] where it is padded",
    "window": "tap (i, j) of output pixel (y, x) is input pixel (y * stride + i * dilation - padding, likewise for x)",
    "groups": "filter o sees channels g * C .. g * C + C - 1, with g = o / (filters / groups) and C of weight",
}
_LINES = 4096


def memory_images(
    plan: IntegerPlan, image: Tensor, pixels: Normalization
) -> tuple[dict[str, Any], dict[str, Iterable[str]]]:
    """Write a network, and what it makes of one image, as memory images.

    Args:
        plan: The network.
        image: Bytes ``[H, W, C]`` uint8.
        pixels: How images are normalized, for the manifest.

    Returns:
        The manifest, JSON-ready, and for each file it names the text, in pieces that are made while they are read.

    Raises:
        ExportError: The plan does not fit together or could overflow, or the image is of another size.
    """
    check_exportable(plan)
    check_images("image is", image, plan)
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
            "zero": entry(f"activation_{number:03}_zero", activation.zero, "C"),
        }
        for number, activation in enumerate(plan.activations)
    ]
    steps = []
    for index, (step, path) in enumerate(zip(plan.steps, plan.paths, strict=True)):
        arrays = {
            name: entry(f"step_{index:03}_{name}", tensor, _dimensions(tensor))
            for name, tensor in step_tensors(step).items()
        }
        steps.append({"index": index, "path": path} | _described(step) | {"arrays": arrays})
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
    """Numbers as words of hexadecimal digits, one to a line."""
    width = values.element_size()
    for part in values.flatten().split(_LINES):
        big_endian = part.numpy().astype(part.numpy().dtype.newbyteorder(">"))
        yield big_endian.tobytes().hex("\n", width) + "\n"


def _dimensions(tensor: Tensor) -> str:
    return {1: "O", 2: "O(HWC)", 4: "OHWC"}[tensor.ndim]


def _described(step: Step) -> dict[str, Any]:
    """What a step does, without its arrays."""
    found: dict[str, Any] = {"kind": step.kind, "formula": _SUMS[step.kind], "input": step.input}
    if isinstance(step, Linear):
        return found
    found["output"] = step.output
    if not isinstance(step, Rescale):
        found |= {name: list(pair) for name, pair in step.window._asdict().items()}
    requantization = requantization_of(step)
    if requantization is not None:
        found |= {"levels": requantization.levels, "residual": requantization.residual}
    return found | ({"groups": step.groups} if hasattr(step, "groups") else {})
