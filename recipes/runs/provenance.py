"""Provenance of a model: the command that makes it, the origin of its weights, and the data set it was made with."""

import dataclasses
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
from ..configs.recipe import Recipe
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


@dataclasses.dataclass(frozen=True)
class DataChoice:
    """A data set as it is named on the command line; ``None`` for an option that is not given.

    Args:
        dataset: Name of the data set.
        data_dir: Folder, or address, of its files.
        train_split: Name of the training split.
        val_split: Name of the evaluation split.
        class_map: File with the class index of each class name.
    """

    dataset: str | None = None
    data_dir: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    class_map: str | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "DataChoice":
        """Return what a recipe names, other than by its defaults."""
        values = ((name, getattr(recipe, name)) for name in _FIELDS)
        return cls(**{name: value for name, value in values if value != getattr(Recipe, name)})

    @classmethod
    def of_images(cls, images: UnlabeledImages) -> "DataChoice":
        """Return where unlabeled images are from."""
        return cls(images.dataset, images.data_dir, images.split if images.split != Recipe.train_split else None)

    @classmethod
    def recorded_in(cls, report: Report) -> "DataChoice":
        """Return what a report records, which somebody else may have written."""
        return cls(**{name: value for name in _FIELDS if isinstance(value := report.data.get(name), str) and value})

    def given(self) -> dict[str, str]:
        """Return what is not ``None``, by name."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}

    def facts(self) -> dict[str, str]:
        """Return what a report records: what was given, with absolute paths of what is on this machine."""
        paths = ("data_dir", "class_map")
        return {name: absolute_if_local(value) if name in paths else value for name, value in self.given().items()}


_FIELDS = tuple(field.name for field in dataclasses.fields(DataChoice))


def facts_of_images(images: UnlabeledImages | None, before: Report) -> Mapping[str, Any]:
    """Return what a report records of the images that a verb measured on, and still of their data set.

    Args:
        images: The images; without any, what was recorded before.
        before: Report of the model that the verb began with.
    """
    if images is None:
        return before.data
    facts = DataChoice.of_images(images).facts()
    same = all(before.data.get(name) == facts.get(name) for name in ("dataset", "data_dir"))
    return {**before.data, **facts} if same else facts


def absolute_if_local(path: str) -> str:
    """Return the absolute path of what exists on this machine, and anything else, such as an address, unchanged."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def default_data(
    source: ModelSource, given: DataChoice, announce: Callable[[str], None], *, needed: bool = True
) -> DataChoice:
    """Return the data set that was given, or else the one that a saved model records, with its splits and class map.

    A report may be somebody else's, so nothing is downloaded just because it says so.

    Args:
        source: The model as it was named.
        given: Options of the command line; a ``data_dir`` without a data set is where the recorded one is now.
        announce: Called with a line that says what is used.
        needed: Whether the verb needs images; otherwise it continues without them, and a message says why.

    Returns:
        The data set; its name is ``None`` where none is known.

    Raises:
        DatasetError: The recorded data set is not where it was, or would be downloaded.
    """
    recorded = DataChoice.recorded_in(source.report())
    name = recorded.dataset
    if given.dataset is not None or name is None:
        return given
    chosen = DataChoice(**{**recorded.given(), **given.given()})
    place = chosen.data_dir
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
        others = "".join(
            f", --{option.replace('_', '-')} {value}"
            for option, value in recorded.given().items()
            if option in ("train_split", "val_split", "class_map") and getattr(given, option) is None
        )
        where = f" in {place}" if place else ""
        announce(f"using data set {name}{where}{others}, with which {source.name} was made; --dataset selects another")
        return chosen
    if needed or given.data_dir is not None:
        raise DatasetError(problem)
    announce(f"no images: {problem}")
    return DataChoice()
