"""The GPU kernels against the reference, under Triton's interpreter, and lint for what the interpreter cannot see."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adderkit.adder_layers import conv

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("interpreted_checks.py")
KERNELS = sorted(Path(conv.__file__).parent.rglob("*_kernels.py"))
# A sum of up to 576 terms in another order; half precision also rounds the result.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3, "bf16-fp32": 1e-5}
PARTS = ["cases", "half", "kinks", "nan", "resnet", "parts"]
EXPECTED_CHECKS = 16 + 15 + 2 + 2 + 2 + 1


def test_kernels_match_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *PARTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stderr
    checks = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(checks) == EXPECTED_CHECKS
    for check in checks:
        assert check["margins"], f"wrote beside a tensor: {check}"
        assert max(check["forward"], check["input_grad"]) < TOLERANCE[check["dtype"]], check


def _calls(path, name):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_load_says_what_it_does_beyond_the_edge(path):
    """A lane that is masked off holds anything on a GPU unless ``other`` is given; the interpreter shows zeros."""
    loads = list(_calls(path, "tl.load"))
    assert loads
    for call in loads:
        given = {keyword.arg for keyword in call.keywords}
        assert {"mask", "other"} <= given, f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_every_store_is_masked_and_nothing_is_added_atomically(path):
    source = path.read_text()
    assert all({"mask"} <= {k.arg for k in call.keywords} for call in _calls(path, "tl.store"))
    assert "tl.atomic" not in source
    assert "make_block_ptr" not in source


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernel_files_hold_kernels_only(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
