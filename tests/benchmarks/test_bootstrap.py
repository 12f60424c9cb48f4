"""The repository under the package's name, in a Python that knows nothing of an installation."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_repository_becomes_a_package(tmp_path):
    program = f"""
import runpy, sys
make_importable = runpy.run_path({str(ROOT / "benchmarks" / "bootstrap.py")!r})["make_importable"]
make_importable("another_name")
import another_name.adder_layers.geometry as geometry
assert geometry.pair(3) == (3, 3)
assert sys.modules["another_name"].__file__ == {str(ROOT / "__init__.py")!r}
make_importable("json")
import json
assert json.dumps([]) == "[]"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
