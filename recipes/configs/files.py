"""Recipes as text: the shipped ones and a user's own YAML files, and ``--set key=value``."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...convert.errors import RecipeError
from .recipe import Recipe
from .safe_yaml import load_yaml

_LIMIT = 1 << 18  # bytes of a recipe; the shipped ones have 2 kB


def load_recipe(name: str) -> Recipe:
    """Read a shipped recipe by its name, or a YAML file by its path.

    Raises:
        RecipeError: There is no such recipe, or it is not a mapping of known keys to fitting values.
    """
    return Recipe().changed(parse_yaml(recipe_text(name), name))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(
        path.name.removesuffix(".yaml") for path in files(__package__).iterdir() if path.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """The YAML text of a recipe, header included; see ``load_recipe``."""
    shipped = recipe_names()
    if name in shipped:
        return files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_text(path)
    near = get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "expected a shipped one or the path of a .yaml file;"
    raise RecipeError(f"there is no recipe {name!r}; {hint} shipped: {', '.join(shipped)}")


def copy_recipe(name: str, file: str | None) -> Path:
    """Write a recipe's YAML text to a new file, by default ``<name>.yaml`` in the working directory.

    Raises:
        RecipeError: There is no such recipe, or the file exists or cannot be written.
    """
    load_recipe(name)
    target = Path(file or f"{Path(name).stem}.yaml")
    try:
        with target.open("x", encoding="utf-8") as opened:
            opened.write(recipe_text(name))
    except FileExistsError as error:
        raise RecipeError(f"{target} exists already; name another file: adderkit recipes copy {name} FILE") from error
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def read_text(path: Path) -> str:
    """A small text file that a user may have written."""
    try:
        if path.stat().st_size > _LIMIT:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes, expected at most {_LIMIT}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """A YAML mapping with string keys; nothing in it is executed."""
    try:
        values = load_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{name} holds a {type(values).__name__}, expected a mapping of recipe keys to values")
    return values


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["lr=0.1", "data_dir=null"]`` as a mapping; values are read as YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise RecipeError(f"--set got {setting!r}, expected key=value such as lr=0.05")
        try:
            values[key.strip().replace("-", "_")] = load_yaml(value)
        except ValueError as error:
            raise RecipeError(f"--set {setting!r}: the value is not valid YAML") from error
    return values
