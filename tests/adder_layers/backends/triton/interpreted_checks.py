"""Runs the GPU kernels under Triton's interpreter and prints one JSON line per check.

A program of its own, started by test_gpu_interpreted.py: the interpreter has to be asked for before the kernels are
imported, and must not be what other tests get.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from adderkit.adder_layers.backends.blocked import compute_dtype
from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.geometry import Window, pair, terms_first
from adderkit.adder_layers.reference import adder_conv2d_reference

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WINDOW = {"stride": 1, "padding": 0, "dilation": 1}
# Elements on either side of a tensor that a kernel must neither use nor write.
MARGIN = 97

CASES = {
    "1x1": ((2, 5, 6, 7), (9, 5, 1, 1), {}),
    "3x3-stride2": ((2, 9, 9, 9), (17, 9, 3, 3), {"stride": 2, "padding": 1}),
    "padding-above-kernel": ((2, 8, 3, 4), (8, 8, 2, 2), {"padding": 5}),
    "dilation2-groups2": ((2, 16, 6, 5), (34, 8, 3, 3), {"groups": 2, "padding": (1, 2), "dilation": 2}),
    "depthwise": ((2, 5, 6, 6), (5, 1, 3, 3), {"groups": 5, "padding": 1}),
    "depthwise-multiplier3-stride2": ((2, 3, 7, 6), (9, 1, 3, 3), {"groups": 3, "stride": 2}),
    "non-square": ((2, 8, 9, 12), (16, 8, 2, 5), {"stride": (3, 2), "padding": (1, 4), "dilation": (2, 1)}),
    "few-filters": ((3, 3, 7, 11), (5, 3, 3, 2), {"stride": (2, 3)}),
    "one-pixel-output": ((2, 3, 4, 5), (4, 3, 4, 5), {}),
    "three-terms": ((2, 9, 5, 6), (17, 9, 3, 2, 3), {"stride": 2, "padding": 1}),
    "two-terms-groups2": ((2, 16, 5, 4), (18, 8, 2, 3, 3), {"groups": 2, "padding": 1}),
    "two-terms-depthwise": ((2, 5, 6, 6), (10, 1, 2, 3, 3), {"groups": 5, "padding": 1}),
    "stride-above-kernel": ((2, 8, 9, 8), (8, 8, 1, 2), {"stride": (4, 3)}),
}

BOTH_FORMATS = ("3x3-stride2", "depthwise", "few-filters")


def guarded(tensor):
    """A copy in the same layout whose memory is surrounded by NaN."""
    memory = torch.full((tensor.numel() + 2 * MARGIN,), float("nan"), dtype=tensor.dtype)
    copy = memory.as_strided(tensor.shape, tensor.stride(), MARGIN)
    return copy.copy_(tensor)


def poisoned(shape, dtype, memory_format):
    """A tensor of NaN inside a larger one of 7, and the larger one."""
    like = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    memory = torch.full((like.numel() + 2 * MARGIN,), 7.0, dtype=dtype)
    return memory.as_strided(like.shape, like.stride(), MARGIN).fill_(float("nan")), memory


def untouched(memory):
    return bool((memory[:MARGIN] == 7).all() and (memory[-MARGIN:] == 7).all())


def error(actual, expected):
    """Largest error as a share of the largest expected value; NaN counts as infinite."""
    difference = (actual.float() - expected).abs().nan_to_num(nan=float("inf"))
    return (difference.max() / expected.abs().max().clamp(min=1)).item()


def both(input, weight, options, memory_format):
    """Errors of forward and input gradient against the reference in fp32, and whether neighbors were left alone."""
    wide_input, wide_weight = (tensor.float().requires_grad_() for tensor in (input, weight))
    expected = adder_conv2d_reference(wide_input, wide_weight, None, **options)
    dtype = torch.promote_types(input.dtype, weight.dtype)
    grad = torch.randn_like(expected).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, wide_input, grad.float())
    window = Window.of(weight, *(pair(options.get(key, default)) for key, default in WINDOW.items()))
    groups = options.get("groups", 1)
    x, w = guarded(input.contiguous(memory_format=memory_format)), guarded(weight)
    g = guarded(grad.contiguous(memory_format=memory_format))
    output, output_memory = poisoned(expected.shape, dtype, memory_format)
    gpu.forward(x, terms_first(w), output, window, groups)
    result, result_memory = poisoned(input.shape, compute_dtype(input.dtype), memory_format)
    gpu.input_grad(g, x, terms_first(w), result, window, groups)
    return {
        "forward": error(output, expected.detach()),
        "input_grad": error(result, expected_grad),
        "margins": untouched(output_memory) and untouched(result_memory),
    }


def run(name, dtype, memory_format, input, weight, options):
    torch.manual_seed(0)
    result = both(input, weight, options, FORMATS[memory_format])
    print(json.dumps({"name": name, "dtype": dtype, "format": memory_format, **result}), flush=True)


def run_nan(name, input, weight, options):
    """A NaN comes out in the same places as from the reference."""
    leaf = input.clone().requires_grad_()
    expected = adder_conv2d_reference(leaf, weight, None, **options)
    expected.sum().backward()
    window = Window.of(weight, *(pair(options.get(key, default)) for key, default in WINDOW.items()))
    output, result = torch.zeros_like(expected), torch.zeros_like(input)
    gpu.forward(input, terms_first(weight), output, window, options.get("groups", 1))
    gpu.input_grad(torch.ones_like(expected), input, terms_first(weight), result, window, options.get("groups", 1))
    wrong = [float((a.isnan() != b.isnan()).any()) for a, b in ((output, expected), (result, leaf.grad))]
    checked = {"name": name, "dtype": "fp32", "forward": wrong[0], "input_grad": wrong[1], "margins": True}
    print(json.dumps(checked), flush=True)


def draw(input_shape, weight_shape, dtype):
    torch.manual_seed(0)
    return torch.randn(input_shape).to(DTYPES[dtype]), torch.randn(weight_shape).to(DTYPES[dtype])


def main(part):
    torch.set_num_threads(1)
    if part == "cases":
        for name, (input_shape, weight_shape, options) in CASES.items():
            for memory_format in FORMATS if name in BOTH_FORMATS else ("contiguous",):
                run(name, "fp32", memory_format, *draw(input_shape, weight_shape, "fp32"), options)
    elif part == "half":
        # Between them every kernel, in every half-precision dtype and layout; under autocast weights stay fp32.
        for name in ("1x1", "3x3-stride2", "depthwise"):
            input_shape, weight_shape, options = CASES[name]
            for dtype in ("fp16", "bf16"):
                for memory_format in FORMATS:
                    run(name, dtype, memory_format, *draw(input_shape, weight_shape, dtype), options)
            input, weight = draw(input_shape, weight_shape, "bf16")
            run(name, "bf16-fp32", "contiguous", input, weight.float(), options)
    elif part == "kinks":
        # Differences are exactly -2, -1, 0, 1 and 2: both kinks of HardTanh and that of the absolute value.
        for name in ("1x1", "depthwise"):
            input_shape, weight_shape, options = CASES[name]
            torch.manual_seed(1)
            input, weight = torch.randint(-1, 2, input_shape).float(), torch.randint(-1, 2, weight_shape).float()
            run(name, "fp32", "contiguous", input, weight, options)
    elif part == "parts":
        # As a batch of more positions than 32 bits count: images go through one or two at a time.
        gpu.POSITION_LIMIT = 90
        input_shape, weight_shape, options = CASES["3x3-stride2"]
        run("parts", "fp32", "contiguous", *draw((5, *input_shape[1:]), weight_shape, "fp32"), options)
    elif part == "nan":
        for name in ("3x3-stride2", "depthwise"):
            input_shape, weight_shape, options = CASES[name]
            input, weight = draw(input_shape, weight_shape, "fp32")
            input[0, 1, 4, 4] = float("nan")
            run_nan(name, input, weight, options)
    elif part == "resnet":
        run("resnet50-1x1", "fp32", "contiguous", *draw((1, 64, 56, 56), (64, 64, 1, 1), "fp32"), {})
        run("cifar_resnet20-3x3", "fp32", "channels-last", *draw((4, 64, 8, 8), (64, 64, 3, 3), "fp32"), {"padding": 1})


if __name__ == "__main__":
    for part in sys.argv[1:]:
        main(part)
