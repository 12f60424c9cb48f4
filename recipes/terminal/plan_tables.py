"""Tables of a conversion: what each convolution becomes, and how faithful it is after calibration."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from .tables import new_table

if TYPE_CHECKING:
    from ...convert.calibration.calibrate import CalibrationReport
    from ...convert.conversion.plan import ConversionPlan, PlanRow

_REASON_WIDTH = 40  # characters; longer reasons are wrapped, so that the table fits into 120 columns


def plan_table(plan: "ConversionPlan", fidelity: "CalibrationReport | None" = None) -> Table:
    """Table of what convolutions become; neighbors with the same decision and reason share a row without fidelity."""
    found = {layer.path: layer for layer in fidelity.layers} if fidelity else {}
    table = new_table("conversion plan", ("module", "becomes"))
    several = _have_several_terms(plan)
    if several:
        table.add_column("terms", justify="right")
    if found:
        table.add_column("fidelity", justify="right")
    else:
        table.add_column("layers", justify="right")
    table.add_column("reason", max_width=_REASON_WIDTH)

    def group_of(row: "PlanRow") -> tuple[str | int, ...]:
        shared = (row.decision, row.reason, row.terms)
        return (*shared, row.path) if found else shared

    for _, group in groupby(plan.rows, group_of):
        rows = list(group)
        layer = found.get(rows[0].path)
        number = str(len(rows)) if not found else f"{layer.correlation:.3f}" if layer else ""
        becomes = f"[green]{plan.target}[/]" if rows[0].decision == "convert" else "unchanged"
        terms = [_terms(rows[0])] if several else []
        table.add_row(_modules(rows), becomes, *terms, number, escape(rows[0].reason))
    return table


def _have_several_terms(plan: "ConversionPlan") -> bool:
    return any(row.terms > 1 for row in plan.rows)


def _terms(row: "PlanRow") -> str:
    return "" if row.decision == "skip" else str(row.terms)


def _modules(rows: "Sequence[PlanRow]") -> str:
    """Return the first and the last of neighboring modules."""
    first, last = escape(rows[0].path), escape(rows[-1].path)
    return first if len(rows) == 1 else f"{first} … {last}"


def full_plan_table(plan: "ConversionPlan", fidelity: "CalibrationReport | None" = None) -> Table:
    """Table with a row for each convolution: decision, reason, shape, and fidelity after calibration."""
    found = {layer.path: layer for layer in fidelity.layers} if fidelity else {}
    several = ("terms",) if _have_several_terms(plan) else ()
    numbers = ("kernel", "stride", "groups", "channels", "parameters", "products")
    measured = ("fidelity", "beyond range") if found else ()
    table = new_table("conversion plan", ("module", "decision", "reason"), (*several, *numbers, *measured))
    for row in plan.rows:
        cells = [
            escape(row.path),
            f"[green]{row.decision}[/]" if row.decision == "convert" else row.decision,
            escape(row.reason),
            *(_terms(row) for _ in several),
            f"{row.kernel[0]}x{row.kernel[1]}",
            f"{row.stride[0]}x{row.stride[1]}",
            str(row.groups),
            f"{row.in_channels} -> {row.out_channels}",
            f"{row.parameters:,}",
            f"{row.products:,}",
        ]
        if found:
            layer = found.get(row.path)
            cells += [f"{layer.correlation:.3f}", f"{layer.beyond_range:.1%}".replace("%", " %")] if layer else ["", ""]
        table.add_row(*cells)
    return table
