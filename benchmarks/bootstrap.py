"""Makes the repository importable as ``adderkit`` on a machine where it is not installed.

The repository's root is the package, whatever its folder is called, so ``PYTHONPATH`` cannot do it.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable(name: str = "adderkit") -> None:
    """Import the repository under the package's name, unless there is a package of that name already."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
