"""Building blocks of the report page: tables, tiles, rows with bars, and formatted numbers."""

from collections.abc import Iterable, Sequence

from .markup import Html, short, tag
from .svg_charts import bar

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9))
_ROUNDS_UP = 0.9995  # rounds up to 1.00 with three digits


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> Html:
    """Return a table.

    Args:
        heads: Column headings; empty for a table without headings.
        rows: Cells of each row; the first one names the row.
        numbers: Number of trailing columns that hold numbers.
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
    """Return a tile: a prominent number with a label and a note."""
    parts = [tag("dt", label), tag("dd", value, class_="big"), tag("dd", note, class_="faint")]
    return tag("div", *parts[: 3 if note else 2])


def tiles(parts: Iterable[Html]) -> Html:
    """Return tiles side by side."""
    return tag("dl", *parts, class_="tiles")


def change_tile(label: str, before: float, after: float, unit: str = "") -> Html:
    """Return a tile that compares a number of the model with that of the CNN."""
    if before == after:
        return tile(label, engineering(after, unit))
    change = f", {100 * (after / before - 1):+.1f} %" if before else ""
    return tile(label, engineering(after, unit), f"{engineering(before, unit)} as a CNN{change}")


def layer_row(name: str, value: str, bars: Sequence[tuple[float, str]], label: str) -> Html:
    """Return a layer in a list: name, value, and below them the bars that ``svg_charts.bar`` draws."""
    words = tag("div", tag("code", name), tag("span", value), class_="row")
    return tag("li", words, bar(bars, f"{short(name)}: {label}"))


def layer_list(rows: Iterable[Html], keys: Iterable[tuple[str, str]]) -> Iterable[Html]:
    """Return a legend, from pairs of class and text, and the list of rows."""
    marks = (tag("span", _swatch(kind), text, class_="key") for kind, text in keys)
    return tag("p", *marks, class_="legend"), tag("ol", *rows, class_="layers")


def _swatch(kind: str) -> Html:
    box = tag("rect", class_=kind, width=12, height=12, rx=2)
    return tag("svg", box, width=12, height=12, aria_hidden="true")


def engineering(value: float, unit: str = "") -> str:
    """Format a number with three digits and an SI prefix, such as ``12.3 M``."""
    for prefix, size in _PREFIXES:
        if abs(value) >= _ROUNDS_UP * size:
            return f"{f'{value / size:#.3g}'.rstrip('.')} {prefix}{unit}".rstrip()
    return f"{value:g} {unit}".rstrip()


def before_after(name: str, before: float, after: float, form: str = ",") -> list[str]:
    """Return a row with a number before and after."""
    return [name, f"{before:{form}}", f"{after:{form}}"]
