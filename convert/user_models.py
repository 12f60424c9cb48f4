"""``--import``: Python code of the user that registers networks with timm."""

import logging
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .errors import ModelSourceError

_logger = logging.getLogger(__name__)
OPTION = "--import"


def split_imports(words: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its other words and the values of ``--import``, which may stand anywhere.

    Raises:
        ModelSourceError: ``--import`` is the last word.
    """
    others, names = [], []
    remaining = iter(words)
    for word in remaining:
        if word == OPTION:
            name = next(remaining, None)
            if name is None:
                raise ModelSourceError(f"{OPTION} needs the module or file that registers your models")
            names.append(name)
        elif word.startswith(f"{OPTION}="):
            names.append(word.removeprefix(f"{OPTION}="))
        else:
            others.append(word)
    return others, names


def import_option() -> str:
    """Return the ``--import`` options of this process' command line, for a command to repeat; each ends in a space."""
    return "".join(f"{OPTION} {name} " for name in split_imports(sys.argv[1:])[1])


def import_models(name: str, debug: bool = False) -> None:
    """Run the user's code that registers models with timm.

    Args:
        name: A Python file, or the name of a module in the working directory or on Python's path.
        debug: Let an error of that code pass unchanged, with its traceback.

    Raises:
        ModelSourceError: The module does not exist, or raises an error.
    """
    import timm  # registers our own models first, so that a module may build on them

    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ModelSourceError(f"{OPTION} {name} does not exist, expected a Python file or the name of a module")
    first = (path.stem if is_file else name) not in sys.modules
    known = timm.list_models()
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that no file there takes the name of an installed package
    try:
        _run_file(path) if is_file else import_module(name)
    except Exception as error:
        if debug or isinstance(error, ModelSourceError):
            raise
        reason = " ".join(str(error).split())
        raise ModelSourceError(
            f"cannot import {name} ({type(error).__name__}: {reason}); --debug shows where it fails"
        ) from error
    if first and timm.list_models() == known:
        _logger.warning("%s %s registers no new model with timm, expected functions with @register_model", OPTION, name)


def _run_file(path: Path) -> None:
    """Import a file under its own name, wherever it is."""
    taken = sys.modules.get(path.stem)
    if taken is not None:
        if getattr(taken, "__file__", None) == str(path.resolve()):
            return
        raise ModelSourceError(f"{OPTION} {path} has the name of the Python module {path.stem}; rename the file")
    spec = spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # where timm looks up the module of a network that is registered
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
