"""``adderkit inspect``: a model's cost as tables for people, with a chart on demand."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ...convert.cost.count import Cost, IntegerRow, cost
from ...convert.cost.energy import PRECISIONS, arithmetic_energy, memory_energy
from ...convert.cost.formulas import Operations
from ...convert.errors import AdderkitError
from ...convert.model_source import build_model, is_folder
from ..reporting.cost_chart import check_chart, draw_chart

_UJ = 1e6  # pJ
_MB = 1e6  # bytes
_COUNTS = ("multiplications before", "after", "additions before", "after")


def run_inspection(
    model: str,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    chart: str | None = None,
    announce: Callable[[str], None] = print,
) -> Cost:
    """Count a model's cost, and draw it.

    Args:
        model: Saved folder or timm name; a name is built without weights, which a count does not need.
        num_classes: Of the model, where it is built from a name.
        in_chans: Likewise.
        input_size: ``(channels, height, width)`` of the image; by default the model's own.
        chart: PNG or SVG file to draw.
        announce: Told where the chart is.

    Raises:
        AdderkitError: The model or the image is wrong, or the chart cannot be written.
    """
    if input_size is not None and min(input_size) < 1:
        raise AdderkitError(f"input size is {' '.join(map(str, input_size))}, expected three positive numbers")
    target = check_chart(chart) if chart is not None else None  # before the work, which may take long
    built = build_model(model, pretrained=is_folder(model), num_classes=num_classes, in_chans=in_chans)
    found = cost(built, input_size)
    if target is not None:
        draw_chart(found, target, Path(model).name)
        announce(f"chart: {target}")
    return found


def cost_tables(cost: Cost) -> list[Table]:
    """Operations by layer, bytes and energy by layer, then the totals: what a reader sees last."""
    integers = [integer_table(cost.integers)] if cost.integers else []
    return [*integers, _operations_table(cost), _energy_table(cost), _total_table(cost), _total_energy_table(cost)]


def integer_table(rows: Iterable[IntegerRow]) -> Table:
    """What the steps of an integer network write."""
    table = Table(title="integers: what each step writes", title_justify="left")
    _columns(table, ("layer", "kind"), ("bits", "channel groups", "from", "to", "bits of sums"))
    for row in rows:
        ends = ["" if end is None else f"{end:.3g}" for end in (row.low, row.high)]
        table.add_row(escape(row.path), row.kind, str(row.bits), str(row.groups), *ends, str(row.sum_bits))
    return table


def _operations_table(cost: Cost) -> Table:
    shape = "x".join(map(str, cost.input_shape))
    table = Table(title=f"operations for one image of {shape}, before (as a CNN) and after", title_justify="left")
    _columns(table, ("layer", "kind"), ("output", *_COUNTS, "parameters"))
    for row in cost.layers:
        table.add_row(
            escape(row.path) or "(model)",
            row.kind,
            "x".join(map(str, row.output_shape)),
            *_before_after(row.before, row.operations),
            f"{row.parameters:,}",
        )
    return table


def _energy_table(cost: Cost) -> Table:
    title = "bytes in fp32, and energy of the arithmetic in µJ before (as a CNN) and after, by format"
    table = Table(title=title, title_justify="left")
    names = [name for each in PRECISIONS for name in (f"{each} before", "after")]
    _columns(table, ("layer", "kind"), ("weights kB", "activations kB", *names))
    fp32 = PRECISIONS["fp32"]
    for row in cost.layers:
        energies = [
            arithmetic_energy(operations, precision) / _UJ
            for precision in PRECISIONS.values()
            for operations in (row.before, row.operations)
        ]
        sizes = (row.weight_bytes(fp32) / 1e3, row.activation_bytes(fp32) / 1e3)
        cells = [*(f"{size:,.1f}" for size in sizes), *(f"{energy:,.2f}" for energy in energies)]
        table.add_row(escape(row.path) or "(model)", row.kind, *cells)
    return table


def _total_table(cost: Cost) -> Table:
    table = Table(title="operations for one image, in total", title_justify="left")
    _columns(table, ("count",), _COUNTS)
    table.add_row("papers' headline", *_before_after(cost.headline_before, cost.headline))
    table.add_row("honest", *_before_after(cost.honest_before, cost.honest), end_section=True)
    kinds = dict.fromkeys(row.kind for row in cost.layers)
    for kind in kinds:
        rows = [row for row in cost.layers if row.kind == kind]
        before, after = (_sum(getattr(row, name) for row in rows) for name in ("before", "operations"))
        table.add_row(f"  {kind}", *_before_after(before, after))
    notes = [
        "papers' headline: weight layers alone, in an adder network the first and last taken for adder layers",
        "honest: all that runs; a BatchNorm is folded behind a convolution, and cannot be behind an adder layer",
    ]
    if functions := cost.honest.functions:
        notes.append(f"besides, before and after: {functions:,} exponentials, roots and divisions; no price, no energy")
    if cost.uncounted:
        notes.append(f"without a formula, not counted: {', '.join(cost.uncounted)}")
    table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def _total_energy_table(cost: Cost) -> Table:
    """Arithmetic before and after, memory beside it."""
    table = Table(title="energy for one image in µJ (Horowitz, ISSCC 2014, 45 nm)", title_justify="left")
    memory_columns = ("weights MB", "activations MB", "memory: SRAM", "memory: DRAM")
    _columns(table, ("format",), ("arithmetic before", "after", "saved", *memory_columns))
    for name, precision in PRECISIONS.items():
        before, after = (arithmetic_energy(each, precision) for each in (cost.honest_before, cost.honest))
        weights, activations = cost.weight_bytes(precision), cost.activation_bytes(precision)
        memory = {level: energy / _UJ for level, energy in memory_energy(weights + activations).items()}
        table.add_row(
            f"{name}, sums in {precision.sums}",
            f"{before / _UJ:,.1f}",
            f"{after / _UJ:,.1f}",
            f"{100 * (1 - after / before):.0f} %" if before else "",
            f"{weights / _MB:,.2f}",
            f"{activations / _MB:,.2f}",
            f"{memory['sram_1mb']:,.0f}",
            f"{memory['dram_least']:,.0f} to {memory['dram_most']:,.0f}",
        )
    table.caption_justify = "left"
    table.caption = (
        f"{cost.parameters:,} parameters. Memory, the same before and after: each weight read once, each activation\n"
        "written and read once, all from a 1 MB SRAM or all from DRAM. On GPUs an addition in fp32 is no faster than\n"
        "a multiplication: these figures are for hardware made for the purpose."
    )
    return table


def _columns(table: Table, words: Iterable[str], numbers: Iterable[str]) -> None:
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")


def _before_after(before: Operations, after: Operations) -> list[str]:
    counts = (before.multiplications, after.multiplications, before.additions, after.additions)
    return [f"{count:,}" for count in counts]


def _sum(operations: Iterable[Operations]) -> Operations:
    return sum(operations, Operations())
