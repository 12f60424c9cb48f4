"""Highest rate that the arithmetic units allow: measured by a loop on registers on a CPU, computed for a GPU."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from adderkit.adder_layers.backends import cpu

FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"], "avx2": ["-mavx2", "-mfma"]}


def issue_limit(device: str, instruction_set: str | None = None) -> dict[str, float]:
    """Return giga-terms per second of forward, input gradient, products and byte differences; empty if unknown.

    Args:
        device: ``"cpu"``, measured on as many threads as torch uses, or ``"cuda"``, from the device's clock.
        instruction_set: Instruction set of the CPU; by default the one that the fp32 kernels use.
    """
    if device == "cuda":
        from .timing import INSTRUCTIONS_PER_TERM, hardware

        rate = hardware()["issue_limit_giga_terms_per_second"]
        return {"forward": rate, "input gradient": rate, "products": INSTRUCTIONS_PER_TERM * rate} if rate else {}
    best = instruction_set or cpu.instruction_set() or ""
    compiler, flags = shutil.which("c++"), FLAGS.get(best.removesuffix("_float"))
    if compiler is None or flags is None:
        return {}
    source = Path(__file__).with_name("issue_limit.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "issue_limit"
        command = [compiler, "-O3", "-std=gnu++17", "-fopenmp", *flags, str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True, env=environment)
    names = ("forward", "input gradient", "products", "byte differences")
    return dict(zip(names, map(float, done.stdout.split()), strict=True))
