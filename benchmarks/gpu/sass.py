"""Statistics of the GPU kernels' machine code, for layers of ResNets and MobileNetV2; no GPU is needed.

    python -m benchmarks.gpu.sass --json

Prints a line per kernel and configuration, or one JSON list: share of useful arithmetic in the hot loop, instructions,
registers, instructions that move spilled registers (anywhere, and in the hot loop), shared memory in bytes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import triton  # type: ignore[import-untyped]

from adderkit.adder_layers.backends.triton.launch import Launch
from adderkit.adder_layers.backends.triton.tiles import KERNELS

from .disassembly import DTYPES, FORMATS, LAYERS, USEFUL, compile_launch, integer_launch_of, launch_of, measure


def main() -> None:
    """Measure every requested combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--target", choices=("sm_80", "sm_90", "sm_100"), default="sm_90")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--memory-format", choices=FORMATS, nargs="+", default=["nchw"])
    parser.add_argument("--layer", choices=LAYERS, nargs="+", default=list(LAYERS))
    options = parser.parse_args()
    rows = []
    for row in measurements(options.target, options.dtype, options.memory_format, options.layer):
        rows.append(row)
        if not options.json:
            print(
                f"{row['kernel']:18} {row['layer']:34} {row['memory_format']:13} {row['dtype']}  useful "
                f"{row['useful_share']:5.1%} of {row['loop_instructions']:4}, {row['instructions']:4} instructions, "
                f"{row['registers']:3} registers, {row['spills']} spills"
            )
    if options.json:
        result = {"target": options.target, "triton": triton.__version__, "kernels": rows}
        json.dump(result, sys.stdout, indent=2)
        print()


def measurements(
    target: str, dtypes: list[str], memory_formats: list[str], layers: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a dictionary per kernel, layer, memory format and dtype; the integer kernels come last, in one format."""
    for kernel in KERNELS:
        for layer in layers:
            for memory_format in memory_formats:
                for dtype in dtypes:
                    launch = launch_of(kernel, LAYERS[layer], memory_format, dtype, target)
                    # The kernels for thin groups use other instructions to clamp and multiply.
                    useful = USEFUL[kernel] if launch.kernel.endswith("tiled") else ("FADD", "FMUL", "FFMA", "FMNMX")
                    yield described(launch, layer, memory_format, dtype, useful, target)
    for layer in layers:
        launch = integer_launch_of(LAYERS[layer], False, target)
        # Kernels for thin groups subtract the smaller byte from the larger.
        useful = USEFUL["integer"] if launch.kernel.endswith("tiled") else ("VIMNMX", "IADD3", "IMAD.IADD")
        yield described(launch, layer, "nhwc", "uint8", useful, target)


def described(
    launch: Launch, layer: str, memory_format: str, dtype: str, useful: tuple[str, ...], target: str
) -> dict[str, Any]:
    """Return the statistics of a launch's machine code."""
    report = measure(compile_launch(launch, target), useful)
    return {
        "kernel": launch.kernel,
        "layer": layer,
        "memory_format": memory_format,
        "dtype": dtype,
        "configuration": launch.options,
        "useful_share": round(report.useful_share, 4),
        "loop_instructions": report.loop.instructions,
        "instructions": report.instructions,
        "registers": report.registers,
        "spills": report.local,
        "loop_spills": report.loop.local,
        "loop_barriers": report.loop.barriers,
        "shared_bytes": report.shared,
    }


if __name__ == "__main__":
    main()
