"""Parts that the sections of a report share: tables, tiles, rows with bars, and numbers as people read them."""

from collections.abc import Iterable, Sequence

from .charts import bar
from .markup import Html, short, tag

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9))
_ROUNDS_UP = 0.9995  # to 1.00, with three digits


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> Html:
    """A table.

    Args:
        heads: Of the columns; none for a table without.
        rows: Cells, of which the first names the row.
        numbers: How many of the last columns are numbers.
    """
    body = [
        tag("tr", *(_cell("td" if column else "th", cell, column, row, numbers) for column, cell in enumerate(row)))
        for row in rows
    ]
    head = [_cell("th", name, column, heads, numbers) for column, name in enumerate(heads)]
    return tag("table", *([tag("thead", tag("tr", *head))] if heads else []), tag("tbody", *body))


def _cell(name: str, content: object, column: int, row: Sequence[object], numbers: int) -> Html:
    return tag(name, content, class_="number" if column >= len(row) - numbers else None)


def tile(label: str, value: str, note: str = "") -> Html:
    """A number that is to be seen first, with what it is and a note."""
    parts = [tag("dt", label), tag("dd", value, class_="big"), tag("dd", note, class_="faint")]
    return tag("div", *parts[: 3 if note else 2])


def tiles(parts: Iterable[Html]) -> Html:
    """Tiles side by side."""
    return tag("dl", *parts, class_="tiles")


def change_tile(label: str, before: float, after: float, unit: str = "") -> Html:
    """A tile for a number of the model beside that of the CNN."""
    if before == after:
        return tile(label, engineering(after, unit))
    change = f", {100 * (after / before - 1):+.1f} %" if before else ""
    return tile(label, engineering(after, unit), f"{engineering(before, unit)} as a CNN{change}")


def layer_row(name: str, value: str, bars: Sequence[tuple[float, str]], label: str) -> Html:
    """A layer in a list: name, value, and bars below them; see ``bar``."""
    words = tag("div", tag("code", name), tag("span", value), class_="row")
    return tag("li", words, bar(bars, f"{short(name)}: {label}"))


def layer_list(rows: Iterable[Html], keys: Iterable[tuple[str, str]]) -> Iterable[Html]:
    """What the colors mean, ``(class, text)`` each, and the list."""
    marks = (tag("span", _swatch(kind), text, class_="key") for kind, text in keys)
    return tag("p", *marks, class_="legend"), tag("ol", *rows, class_="layers")


def _swatch(kind: str) -> Html:
    box = tag("rect", class_=kind, width=12, height=12, rx=2)
    return tag("svg", box, width=12, height=12, aria_hidden="true")


def engineering(value: float, unit: str = "") -> str:
    """Three digits with a prefix, such as ``12.3 M``."""
    for prefix, size in _PREFIXES:
        if abs(value) >= _ROUNDS_UP * size:
            return f"{f'{value / size:#.3g}'.rstrip('.')} {prefix}{unit}".rstrip()
    return f"{value:g} {unit}".rstrip()


def before_after(name: str, before: float, after: float, form: str = ",") -> list[str]:
    """A row with a number of the CNN and of the model."""
    return [name, f"{before:{form}}", f"{after:{form}}"]
