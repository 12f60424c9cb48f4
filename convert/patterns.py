"""Pattern language for module paths, and the check of keys that all configurations share."""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from .errors import AdderkitError


def check_keys(form: type, mapping: Mapping[str, Any], version: int, what: str) -> None:
    """Refuse a mapping of an unknown version, or with keys that are not fields of a dataclass.

    Args:
        form: The dataclass that the mapping describes.
        mapping: The mapping to check, which somebody else may have written.
        version: The version that this release knows; assumed if the mapping has none.
        what: Name of the dataclass in messages.

    Raises:
        AdderkitError: The version or a key is unknown.
    """
    found = mapping.get("version", version)
    if found != version:
        raise AdderkitError(f"{what} has version {found!r:.80}, expected {version}: install a newer adderkit")
    known = [field.name for field in dataclasses.fields(form)]
    for key in mapping:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AdderkitError(f"unknown key {key!r:.80} in the {what}{hint}")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression for a path, a glob or ``re:…``.

    Raises:
        AdderkitError: The pattern is empty, or its regular expression is malformed.
    """
    if not pattern:
        raise AdderkitError("a module pattern is empty; expected a path, a glob such as 'layer4.*' or 're:<regex>'")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise AdderkitError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def matching(patterns: Iterable[str], name: str) -> str | None:
    """Return the first of the patterns that matches the whole name, or ``None``."""
    return next((pattern for pattern in patterns if compile_pattern(pattern).fullmatch(name)), None)


def nearest_names(pattern: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Return module names similar to a mistyped pattern, best first."""
    return get_close_matches(pattern.removeprefix("re:"), list(names), n=limit, cutoff=0.3)
