"""Results as tables for people; programs get the same by ``--json``."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...convert.calibration.calibrate import CalibrationReport
from ...convert.conversion.plan import ConversionPlan
from ..runs.state import Row
from ..training.evaluate import Metrics
from ..verbs.demo import DemoRow


def show(table: Table) -> None:
    """Print a table on standard output, never cutting a cell where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def plan_table(plan: ConversionPlan, fidelity: CalibrationReport | None = None) -> Table:
    """A row for each convolution: decision, reason, and how faithful it is after calibration."""
    found = {layer.path: layer for layer in fidelity.layers} if fidelity else {}
    table = Table(title="conversion plan", title_justify="left")
    for column in ("module", "decision", "reason"):
        table.add_column(column)
    for column in ("kernel", "stride", "groups", "channels", "parameters", "terms"):
        table.add_column(column, justify="right")
    if found:
        table.add_column("fidelity", justify="right")
        table.add_column("beyond range", justify="right")
    for row in plan.rows:
        cells = [
            escape(row.path),
            f"[green]{row.decision}[/]" if row.decision == "convert" else row.decision,
            escape(row.reason),
            f"{row.kernel[0]}x{row.kernel[1]}",
            f"{row.stride[0]}x{row.stride[1]}",
            str(row.groups),
            f"{row.in_channels} -> {row.out_channels}",
            f"{row.parameters:,}",
            f"{row.terms:,}",
        ]
        if found:
            layer = found.get(row.path)
            cells += [f"{layer.correlation:.3f}", f"{layer.beyond_range:.1%}".replace("%", " %")] if layer else ["", ""]
        table.add_row(*cells)
    return table


def metrics_table(rows: Sequence[tuple[str, Metrics]]) -> Table:
    """A row for each evaluated model."""
    table = Table()
    table.add_column("model")
    for column in ("top-1 %", "top-5 %", "loss", "images", "images/s"):
        table.add_column(column, justify="right")
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


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """The demo's result."""
    return metrics_table([(row.model, row.metrics) for row in rows])


def summary_table(rows: Sequence[Row]) -> Table:
    """The rows of a run's ``summary.csv``."""
    table = Table(title="run summary", title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(value) if key == "epoch" else f"{value:.4g}" for key, value in row.items()))
    return table
