"""Tables of a model's cost: operations, bytes, energy and area, by layer and in total."""

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from ...convert.cost.area import name_equal_cnn
from ...convert.cost.energy import PRECISIONS, arithmetic_energy, memory_energy
from ...convert.cost.operations import Operations
from ...convert.cost.report import Cost
from .tables import integer_table, new_table

_UJ = 1e6  # pJ
_MB = 1e6  # bytes
_CNN_BITS = (8, 6, 4, 3, 2)
_COUNTS = ("multiplications before", "after", "additions before", "after")


def cost_tables(cost: Cost) -> list[Table]:
    """Tables of operations and of energy by layer, followed by their totals, which a reader sees last."""
    integers = [integer_table(cost.integers)] if cost.integers else []
    totals = [_total_table(cost), _total_energy_table(cost), _area_table(cost)]
    return [*integers, _operations_table(cost), _energy_table(cost), *totals]


def _operations_table(cost: Cost) -> Table:
    shape = "x".join(map(str, cost.input_shape))
    title = f"operations for one image of {shape}, before (as a CNN) and after"
    several = any(row.terms > 1 for row in cost.layers)
    table = new_table(title, ("layer", "kind"), (*(["terms"] * several), "output", *_COUNTS, "parameters"))
    for row in cost.layers:
        table.add_row(
            escape(row.path) or "(model)",
            row.kind,
            *([str(row.terms) if row.kind == "adder" else ""] * several),
            "x".join(map(str, row.output_shape)),
            *_before_after(row.before, row.operations),
            f"{row.parameters:,}",
        )
    return table


def _energy_table(cost: Cost) -> Table:
    title = "bytes in fp32, and arithmetic energy in µJ by format, before (as a CNN) and after"
    names = [name for each in PRECISIONS for name in (f"{each} before", "after")]
    table = new_table(title, ("layer", "kind"), ("weights kB", "activations kB", *names))
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
    table = new_table("total operations for one image", ("count",), _COUNTS)
    table.add_row("papers' headline", *_before_after(cost.headline_before, cost.headline))
    table.add_row("honest", *_before_after(cost.honest_before, cost.honest), end_section=True)
    kinds = dict.fromkeys(row.kind for row in cost.layers)
    for kind in kinds:
        rows = [row for row in cost.layers if row.kind == kind]
        before, after = (_sum(getattr(row, name) for row in rows) for name in ("before", "operations"))
        table.add_row(f"  {kind}", *_before_after(before, after))
    notes = [
        "papers' headline: weight layers only; the first and the last layer of an adder network count as adder layers",
        "honest: everything that runs; a BatchNorm is folded into a convolution before it, but not into an adder layer",
    ]
    if functions := cost.honest.functions:
        notes.append(
            f"not included, before and after: {functions:,} exponentials, roots and divisions, whose energy is unknown"
        )
    if cost.uncounted:
        notes.append(f"not counted, for want of a formula: {', '.join(cost.uncounted)}")
    table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def _total_energy_table(cost: Cost) -> Table:
    """Table of the energy by number format: arithmetic before and after, and memory."""
    title = "energy for one image in µJ (Horowitz, ISSCC 2014, 45 nm)"
    arithmetic = ("arithmetic before", "after", "saved")
    memory = ("weights MB", "activations MB", "memory: SRAM", "memory: DRAM")
    table = new_table(title, ("format",), (*arithmetic, *memory))
    for name, precision in PRECISIONS.items():
        before, after = (arithmetic_energy(each, precision) for each in (cost.honest_before, cost.honest))
        weights, activations = cost.weight_bytes(precision), cost.activation_bytes(precision)
        moving = {level: energy / _UJ for level, energy in memory_energy(weights + activations).items()}
        table.add_row(
            f"{name}, sums in {precision.sums}",
            f"{before / _UJ:,.1f}",
            f"{after / _UJ:,.1f}",
            f"{100 * (1 - after / before):.0f} %" if before else "",
            f"{weights / _MB:,.2f}",
            f"{activations / _MB:,.2f}",
            f"{moving['sram_1mb']:,.0f}",
            f"{moving['dram_least']:,.0f} to {moving['dram_most']:,.0f}",
        )
    several = any(row.terms > 1 for row in cost.layers)
    memory_of = "Memory is that of this model" if several else "Memory is the same before and after"
    table.caption_justify = "left"
    table.caption = (
        f"{cost.parameters:,} parameters. {memory_of}: each weight is read once,\n"
        "each activation written and read once, all in a 1 MB SRAM or all in DRAM. On GPUs, an fp32 addition is no\n"
        "faster than a multiplication: these figures are for dedicated hardware."
    )
    return table


def _area_table(cost: Cost) -> Table:
    """Table of the area of the arithmetic, beside CNNs with narrower weights."""
    title = "area of the arithmetic in integers, for one image in a million cycles"
    table = new_table(title, ("network",), ("transistors", "of those with 8-bit weights"))
    reference = cost.cnn_area(8)
    areas = {f"as a CNN with {bits}-bit weights": cost.cnn_area(bits) for bits in _CNN_BITS}
    for name, area in {**areas, "this model": cost.area}.items():
        table.add_row(name, f"{area:,.0f}", f"{100 * area / reference:.0f} %" if reference else "")
    table.caption_justify = "left"
    table.caption = (
        f"This model takes {name_equal_cnn(cost.area, cost.cnn_area)}.\n"
        "By logic synthesis, without memory and wiring; activations have 8 bits\n"
        "unless the model is quantized to fewer. The CNNs have the same\n"
        "requantization, and 8-bit weights in their first and last layer."
    )
    return table


def _before_after(before: Operations, after: Operations) -> list[str]:
    counts = (before.multiplications, after.multiplications, before.additions, after.additions)
    return [f"{count:,}" for count in counts]


def _sum(operations: Iterable[Operations]) -> Operations:
    return sum(operations, Operations())
