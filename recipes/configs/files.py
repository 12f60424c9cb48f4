"""Recipe files: the shipped recipes, a user's own YAML files, and ``--set key=value``."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ...convert.errors import RecipeError
from ...convert.files import write_text
from ...convert.output import check_output_file
from .recipe import Recipe

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1 << 16  # of a recipe file; the shipped ones have 2 kB, and PyYAML takes seconds for a megabyte


def load_recipe(name: str) -> Recipe:
    """Load a shipped recipe by name, or a YAML file by path.

    Raises:
        RecipeError: The recipe does not exist, or is not a mapping of known keys to valid values.
    """
    return Recipe().changed(parse_yaml(recipe_text(name), name))


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(
        path.name.removesuffix(".yaml") for path in files(__package__).iterdir() if path.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """Return the YAML text of a recipe, header included.

    Args:
        name: Name of a shipped recipe, or path of a YAML file.

    Raises:
        RecipeError: The recipe does not exist or cannot be read.
    """
    shipped = recipe_names()
    if name in shipped:
        return files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix in _SUFFIXES and path.is_file():
        return read_text(path)
    near = get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "expected the path of a .yaml file or a shipped recipe;"
    raise RecipeError(f"unknown recipe {name!r}; {hint} shipped recipes: {', '.join(shipped)}")


def copy_recipe(name: str, file: str | None, *, overwrite: bool = False) -> Path:
    """Write a recipe's YAML text to a file, by default ``<name>.yaml`` in the working directory.

    Args:
        name: Name of a shipped recipe, or path of a YAML file.
        file: File to write.
        overwrite: Replace an existing file.

    Raises:
        AdderkitError: The recipe does not exist, or the file already exists or cannot be written.
    """
    load_recipe(name)
    target = Path(file or f"{Path(name).stem}.yaml")
    check_output_file(str(target), target, _SUFFIXES, " or ".join(_SUFFIXES), overwrite=overwrite)
    text = recipe_text(name)
    try:
        write_text(target, text)
    except OSError as error:
        raise RecipeError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def read_text(path: Path) -> str:
    """Read a small text file that a user may have edited.

    Raises:
        RecipeError: The file cannot be read, is too large or is not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes, expected at most {_MAX_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a YAML mapping with string keys, using PyYAML's safe loader.

    Args:
        text: YAML text.
        name: File name for error messages.

    Raises:
        RecipeError: The text is not valid YAML or not such a mapping.
    """
    try:
        values = _load_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{name} contains a {type(values).__name__}, expected a mapping of recipe keys to values")
    return values


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse ``--set`` options such as ``["lr=0.1", "data_dir=null"]``; values are YAML.

    Raises:
        RecipeError: An option has no ``=`` or its value is not valid YAML.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set is {setting!r}, expected key=value such as lr=0.05")
        try:
            values[key.strip().replace("-", "_")] = _load_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set {setting!r}: the value is not valid YAML") from error
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with errors for equal keys, of which the last would win, and for aliases of lists.

    A few hundred bytes of aliases can stand for billions of values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and isinstance(node, yaml.CollectionNode):
            raise ConstructorError(None, None, "an alias of a list or mapping", node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        ValueError: The text is not valid; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # also from PyYAML's constructors: impossible dates, deep nesting
        if isinstance(error, yaml.MarkedYAMLError) and error.problem:
            line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ValueError(f"{error.problem}{line}") from error
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
