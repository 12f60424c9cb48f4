"""Provenance of a model: the command that makes it, and the origin of its weights."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from timm.models import split_model_name_tag
from torch import nn

from ...convert.checkpoint.configuration import base_architecture
from ...convert.checkpoint.report import NOT_RECORDED, read_report
from ...convert.hub import PREFIX
from ...convert.model_source import ModelSource

_PROGRAMS = ("adderkit", "convert")
_LONGEST_COMMAND = 10_000  # characters


def command_line() -> str | None:
    """Return the command line of this process, quoted for a shell; ``None`` for Python code that uses the library."""
    program, *words = sys.argv or [""]
    as_module = Path(program).resolve() == Path(__file__).resolve().parents[2] / "__main__.py"
    name = "adderkit" if as_module else Path(program).stem
    return shlex.join([name, *words]) if name in _PROGRAMS else None


def weights_origin(source: ModelSource, model: nn.Module) -> str | None:
    """Return where a model's weights came from: a timm name with its tag, a Hub repository or a folder.

    A folder that records where its own weights came from passes that on.

    Args:
        source: The model as it was named.
        model: The model as it was built.

    Returns:
        The origin, or ``None`` for random weights or a file of unknown origin.
    """
    folder = source.folder if source.checkpoint is None else source.checkpoint_folder
    if folder is not None:
        recorded = read_report(folder).source
        return str(folder.resolve()) if recorded == NOT_RECORDED else recorded
    if source.checkpoint is not None or not source.pretrained:
        return None
    return tagged(source.name, model)


def tagged(name: str, model: nn.Module) -> str:
    """Return a timm name with the tag of its weights, since timm's default tag may change; Hub names are unchanged."""
    if name.startswith(PREFIX):
        return name
    timm_model: Any = model
    tag = split_model_name_tag(name)[1] or timm_model.pretrained_cfg.get("tag")
    return f"{base_architecture(model)}.{tag}" if tag else name


def part_of(report: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object within a JSON object that somebody else may have written; empty if there is no such object."""
    found = report.get(key)
    return found if isinstance(found, Mapping) else {}


def without_local_paths(value: Any) -> Any:
    """Shorten absolute paths in JSON, which reveal details of a machine, to their last part."""
    if isinstance(value, Mapping):
        return {key: without_local_paths(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(each) for each in value]
    return _last_part(value) if isinstance(value, str) else value


def command_without_local_paths(command: str) -> str:
    """Shorten absolute paths in a command line to their last part; a very long command is cut."""
    command = command[:_LONGEST_COMMAND]  # the time that shlex takes grows with the square of the length
    try:
        words = shlex.split(command)
    except ValueError:  # an unclosed quote
        words = command.split()
    return shlex.join("=".join(map(_last_part, word.split("="))) for word in words)


def _last_part(text: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() and len(kind(text).parts) > 1:
            return kind(text).name
    return text
