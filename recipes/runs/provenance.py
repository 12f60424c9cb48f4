"""Provenance of a model: the command that makes it, the origin of its weights, and the data set it was made with."""

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from timm.models import split_model_name_tag
from torch import nn

from ...convert.checkpoint.configuration import base_architecture
from ...convert.checkpoint.report import NOT_RECORDED, Report, read_report
from ...convert.errors import DatasetError
from ...convert.hub import PREFIX
from ...convert.model_source import ModelSource
from ..data.unlabeled import UnlabeledImages

_PROGRAMS = ("adderkit", "convert")
_FETCHING = ("hfds/", "hfids/", "tfds/", "wds/")  # readers that may download
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


def data_facts(dataset: str, data_dir: str | None) -> dict[str, Any]:
    """Return what a report records of a data set: its name, and the absolute path of its folder on this machine."""
    return {"dataset": dataset} if data_dir is None else {"dataset": dataset, "data_dir": absolute_if_local(data_dir)}


def facts_of_images(images: UnlabeledImages | None, before: Report) -> Mapping[str, Any]:
    """Return what a report records of the images that a verb measured on; without any, what was recorded before."""
    return before.data if images is None else data_facts(images.dataset, images.data_dir)


def absolute_if_local(path: str) -> str:
    """Return the absolute path of what exists on this machine, and anything else, such as an address, unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def default_data(
    source: ModelSource,
    dataset: str | None,
    data_dir: str | None,
    announce: Callable[[str], None],
    *,
    needed: bool = True,
) -> tuple[str | None, str | None]:
    """Return the data set that was given, or else the one that a saved model records.

    A report may be somebody else's, so nothing is downloaded just because it says so.

    Args:
        source: The model as it was named.
        dataset: Value of ``--dataset``.
        data_dir: Value of ``--data-dir``; without a data set, the place where the recorded one is now.
        announce: Called with a line that says what is used.
        needed: Whether the verb needs images; otherwise it continues without them, and a message says why.

    Returns:
        Name and folder of the data set; ``None`` where neither is known.

    Raises:
        DatasetError: The recorded data set is not where it was, or would be downloaded.
    """
    name, place = (source.report().data.get(key) for key in ("dataset", "data_dir"))
    if dataset is not None or not isinstance(name, str) or not name:
        return dataset, data_dir
    place = data_dir or (place if isinstance(place, str) else None)
    if place is not None and not Path(place).exists():
        problem = (
            f"{source.name} was made with data set {name} in {place}, which does not exist; say where it is now with "
            "--data-dir DIR, or name another with --dataset"
        )
    elif name.startswith(_FETCHING) and place is None:
        problem = (
            f"{source.name} was made with data set {name}, which may be downloaded: allow that with --dataset {name}"
        )
    else:
        where = f" in {place}" if place else ""
        announce(f"using data set {name}{where}, with which {source.name} was made; --dataset selects another")
        return name, place
    if needed or data_dir is not None:
        raise DatasetError(problem)
    announce(f"no images: {problem}")
    return None, None
