"""A machine with a GPU may have the repository alone: its root is imported as ``adderkit``."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "bootstrap.py"))["make_importable"]()
