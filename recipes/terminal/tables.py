"""Tables of results for people; programs read the same figures with ``--json``."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ...convert.cost.report import IntegerRow
    from ..training.evaluate import Metrics


def show(*tables: Table) -> None:
    """Print tables on standard output; where that is not a terminal, no cell is truncated."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in tables:
        console.print(table)


def new_table(title: str | None, words: Iterable[str], numbers: Iterable[str] = ()) -> Table:
    """Return an empty table with columns of words, aligned left, followed by columns of numbers, aligned right."""
    table = Table(title=title, title_justify="left")
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def metrics_table(rows: Sequence[tuple[str, "Metrics"]]) -> Table:
    """Table of evaluation metrics with a row for each model."""
    table = new_table(None, ("model",), ("top-1 %", "top-5 %", "loss", "images", "images/s"))
    for name, metrics in rows:
        table.add_row(
            escape(name),
            f"{metrics.top1:.2f}",
            f"{metrics.top5:.2f}",
            f"{metrics.loss:.4f}",
            str(metrics.images),
            f"{metrics.images_per_second:.0f}",
        )
    return table


def integer_table(rows: Iterable["IntegerRow"]) -> Table:
    """Table of the steps of an integer network, with the width and the range of their outputs."""
    numbers = ("bits", "channel groups", "min", "max", "sum bits")
    table = new_table("outputs of the integer steps", ("layer", "kind"), numbers)
    for row in rows:
        ends = ["" if end is None else f"{end:.3g}" for end in (row.low, row.high)]
        table.add_row(escape(row.path), row.kind, str(row.bits), str(row.groups), *ends, str(row.sum_bits))
    return table
