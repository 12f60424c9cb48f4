"""Output of the verbs that is not a table: announcements and JSON."""

import sys
from json import dumps, loads
from typing import Any


def announce(line: str) -> None:
    """Print a line about a slow step on standard error; standard output is left to results."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object; NaN, which JSON does not have, is printed as null."""
    print(dumps(loads(dumps(value), parse_constant=lambda _: None)))
