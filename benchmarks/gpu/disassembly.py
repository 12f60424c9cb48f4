"""Compile the GPU kernels for any target, without a device, and count the instructions of their hot loops.

Uses the assembler and disassembler that come with the triton package.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from adderkit.adder_layers.backends.triton import launch as gpu
from adderkit.adder_layers.backends.triton.tiles import Device
from adderkit.adder_layers.geometry import Window
from adderkit.adder_layers.integer.plan import Adder, Requantization
from adderkit.adder_layers.integer.triton_launch import operands_of, plan_adder

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
FORMATS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# From sm_100 on, an instruction may process two numbers.
USEFUL = {
    "forward": ("FADD", "FADD2"),
    "input_grad": ("FADD.SAT", "FFMA", "FADD2", "FFMA2"),
    "integer": ("VABSDIFF4.U8.ACC",),
}
POINTER_NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL = re.compile(r"^\s*(\.L_\S+):")


class Layer(NamedTuple):
    """A convolution of a known network."""

    batch: int
    channels: int
    filters: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1


# Together, the ResNets' layers use every tile of every device; the others use the kernels for thin groups.
LAYERS = {
    "resnet50-1x1-64-256": Layer(256, 64, 256, 56),
    "resnet50-1x1-1024-512-stride2": Layer(256, 1024, 512, 14, 1, 2),
    "resnet50-3x3-64": Layer(256, 64, 64, 56, 3),
    "resnet50-3x3-256-stride2": Layer(256, 256, 256, 28, 3, 2),
    "resnet50-3x3-512": Layer(256, 512, 512, 7, 3),
    "resnet50-3x3-512-batch8": Layer(8, 512, 512, 7, 3),
    "cifar_resnet20-3x3-16": Layer(1024, 16, 16, 32, 3),
    "cifar_resnet20-3x3-16-batch32": Layer(32, 16, 16, 32, 3),
    "cifar_resnet20-3x3-16-32-stride2": Layer(128, 16, 32, 32, 3, 2),
    "cifar_resnet20-3x3-32": Layer(1024, 32, 32, 16, 3),
    "cifar_resnet20-3x3-32-batch64": Layer(64, 32, 32, 16, 3),
    "mobilenetv2-depthwise-96-stride2": Layer(256, 96, 96, 112, 3, 2, 96),
    "mobilenetv2-depthwise-384": Layer(256, 384, 384, 14, 3, 1, 384),
}


class Loop(NamedTuple):
    """Instruction counts of the innermost loop with the most useful instructions."""

    useful: int
    instructions: int
    local: int
    barriers: int


class Report(NamedTuple):
    """Statistics of a compiled kernel; ``local`` counts loads and stores of spilled registers."""

    instructions: int
    registers: int
    local: int
    shared: int
    loop: Loop

    @property
    def useful_share(self) -> float:
        """Share of the hot loop's instructions that are the sum's own arithmetic."""
        return self.loop.useful / self.loop.instructions


def launch_of(kernel: str, layer: Layer, memory_format: str, dtype: str, target: str) -> gpu.Launch:
    """Return the launch for a layer on a device, on meta tensors."""
    padding = layer.kernel // 2
    shape = (layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel)
    options: dict[str, Any] = {"device": "meta", "dtype": DTYPES[dtype]}
    weight = torch.empty(1, *shape, **options)
    window = Window.of(weight, *((value, value) for value in (layer.stride, padding, 1)))
    rows, columns = window.output_size(layer.size, layer.size)
    input = torch.empty(layer.batch, layer.channels, layer.size, layer.size, **options)
    output = torch.empty(layer.batch, layer.filters, rows, columns, **options)
    input, output = (tensor.to(memory_format=FORMATS[memory_format]) for tensor in (input, output))
    device = Device(PROCESSORS[target], TARGETS[target].warp_size, target)
    if kernel == "forward":
        return gpu.plan_forward(input, weight, output, window, layer.groups, device)
    result = torch.empty_like(input, dtype=torch.float32)
    return gpu.plan_input_grad(output, input, weight, result, window, layer.groups, device)


def integer_launch_of(layer: Layer, residual: bool, target: str) -> gpu.Launch:
    """Return the integer engine's launch for a quantized layer on a device, on meta tensors."""

    def bytes(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    kernel, stride, padding = ((value, value) for value in (layer.kernel, layer.stride, layer.kernel // 2))
    window = Window(kernel, stride, padding, (1, 1))
    factor, filters = bytes(layer.filters), layer.filters
    added = (2, factor.int()) if residual else (None, None)
    requantization = Requantization(factor.int(), factor.long(), factor, factor, 255, *added)
    weight = bytes(filters, *kernel, layer.channels // layer.groups)
    step = Adder(0, 1, weight, window, layer.groups, requantization)
    output = bytes(layer.batch, *window.output_size(layer.size, layer.size), filters)
    source = bytes(layer.batch, layer.size, layer.size, layer.channels)
    device = Device(PROCESSORS[target], TARGETS[target].warp_size, target)
    operands = operands_of(step, bytes(layer.channels))
    return plan_adder(step, operands, source, output if residual else None, output, device)


def compile_launch(launch: gpu.Launch, target: str) -> Any:
    """Compile a launch as Triton would when called: 1 becomes a constant, multiples of 16 are marked."""
    function = launch.function()
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    names = [parameter.name for parameter in function.params]
    constants: dict[Any, Any] = {name: value for name, value in launch.options.items() if name in names}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        """Return the type of an argument, or the types of a named tuple's fields."""
        if isinstance(value, tuple):
            return type(value)(*(kind(field, (*path, index)) for index, field in enumerate(value)))
        if not isinstance(value, torch.Tensor) and value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTER_NAMES[value.dtype]
        return "i32" if abs(value) < 2**31 else "i64"

    given = enumerate(zip(names, launch.arguments, strict=False))
    signature = {name: kind(value, (index,)) for index, (name, value) in given}
    ordered = {name: signature.get(name, "constexpr") for name in names}
    options = {name: value for name, value in launch.options.items() if name not in names}
    source = ASTSource(fn=function, signature=ordered, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def measure(compiled: Any, useful: tuple[str, ...]) -> Report:
    """Disassemble a kernel that was compiled for an NVIDIA device and count its instructions.

    Args:
        compiled: The kernel, as returned by ``compile_launch``.
        useful: Instructions that count as useful, with modifiers: ``FADD`` does not include ``FADD.SAT``.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _output("nvdisasm", "-c", file.name)
        usage = _output("cuobjdump", "-res-usage", file.name)
    instructions, labels = _parse(listing)
    loops = [_count(instructions[first:last], useful) for first, last in _innermost(instructions, labels)]
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Report(
        len(instructions),
        int(registers.group(1)),
        sum(_is_local(name) for name, _ in instructions),
        compiled.metadata.shared,
        max(loops, key=lambda loop: loop.useful),
    )


def spilled_on_amd(compiled: Any) -> int:
    """Return the number of vector registers that a kernel compiled for an AMD device spills, from its metadata."""
    count = re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
    assert count is not None
    return int(count.group(1))


def _output(program: str, *arguments: str) -> str:
    command = [str(_BINARIES / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Parse instructions into names and operands, and labels into indices of instructions."""
    instructions: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append((instruction.group(1), instruction.group(2)))
    return instructions, labels


def _innermost(instructions: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of loops, found by backward jumps, that contain no other loop."""
    loops = []
    for index, (name, operands) in enumerate(instructions):
        jump = re.search(r"\((\.L_\S+)\)", operands) if name.startswith("BRA") else None
        if jump and labels.get(jump.group(1), len(instructions)) <= index:
            loops.append((labels[jump.group(1)], index + 1))
    for first, last in loops:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops):
            yield first, last


def _count(loop: list[tuple[str, str]], useful: tuple[str, ...]) -> Loop:
    names = [name for name, _ in loop]
    return Loop(
        sum(name in useful for name in names),
        len(names),
        sum(map(_is_local, names)),
        sum(name.startswith("BAR") for name in names),
    )


def _is_local(name: str) -> bool:
    return name.startswith(("LDL", "STL"))
