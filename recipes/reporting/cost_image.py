"""Image file (PNG or SVG) that charts the operations of each weight layer, before and after the conversion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...convert.cost.operations import WEIGHT_LAYERS, Operations
from ...convert.cost.report import Cost, LayerCost
from ...convert.errors import AdderkitError
from ...convert.files import atomic_path
from ...convert.output import check_output_file

# Colors for color-blind readers (Okabe and Ito, jfly.uni-koeln.de/color); hatches for print in gray.
_DISTANCES = {"color": "#56B4E9", "label": "adder layers, |x - w|"}
_PRODUCTS = {"color": "#D55E00", "label": "● convolution and linear layers, x · w"}
_NORMS = {"color": "#000000", "label": "■ normalizations that cannot be folded"}
_OTHERS = {"color": "#F0E442", "label": "▲ residual sums, gates, pooling, activations, …", "hatch": "////"}


class Bar(NamedTuple):
    """A weight layer and all operations that follow it up to the next one.

    Args:
        path: Module path of the weight layer.
        products: Products that the layer computes.
        distances: Distances that the layer computes.
        norms: Operations of the normalizations that follow.
        others: All other operations that follow.
    """

    path: str
    products: int
    distances: int
    norms: Operations
    others: Operations


def check_chart(name: str, *, overwrite: bool = False) -> Path:
    """Check, before the work, that a chart can be written; return its path.

    Raises:
        AdderkitError: The extension is unknown, the file exists, or its folder is not writable.
    """
    target = Path(name)
    check_output_file(f"--chart {name}", target, (".png", ".svg"), "'.png' or '.svg'", overwrite=overwrite)
    return target


def bars(cost: Cost) -> list[Bar]:
    """Return a bar for each weight layer, in order of execution."""
    return [_bar(group) for group in layer_groups(cost)]


def layer_groups(cost: Cost) -> list[list[LayerCost]]:
    """Group each weight layer with all operations up to the next; those before the first join the first group."""
    groups: list[list[LayerCost]] = []
    early: list[LayerCost] = []
    for row in cost.layers:
        if row.kind in WEIGHT_LAYERS:
            groups.append([row, *early])
            early = []
        else:
            (groups[-1] if groups else early).append(row)
    return groups


def _bar(rows: Sequence[LayerCost]) -> Bar:
    norms, others = Operations(), Operations()
    for row in rows[1:]:
        if row.kind == "normalization":
            norms += row.operations
        else:
            others += row.operations
    layer = rows[0].operations
    return Bar(rows[0].path, layer.products, layer.distances, norms, others)


def draw_chart(cost: Cost, target: Path, title: str) -> None:
    """Draw the multiplications of the CNN, the remaining multiplications and the additions of each layer.

    Args:
        cost: Cost of a model, converted or not.
        target: PNG or SVG file, replaced atomically.
        title: Name of the model.

    Raises:
        AdderkitError: There is nothing to draw, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = bars(cost)
    if not found:
        raise AdderkitError("the model has no convolution, linear or adder layer, so there is nothing to draw")
    height = 2.4 + 0.17 * len(found)  # inches
    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    products, distances = [bar.products for bar in found], [bar.distances for bar in found]
    norms, others = [bar.norms for bar in found], [bar.others for bar in found]
    before = _stack(panels[0], [(products, _PRODUCTS), (distances, _DISTANCES)])
    left = _scatter(
        panels[1],
        [
            (products, _PRODUCTS, "o"),
            ([each.multiplications for each in norms], _NORMS, "s"),
            ([each.multiplications for each in others], _OTHERS, "^"),
        ],
    )
    additions = _stack(
        panels[2],
        [
            (products, _PRODUCTS),
            ([2 * count for count in distances], _DISTANCES),
            ([each.additions for each in norms], _NORMS),
            ([each.additions for each in others], _OTHERS),
        ],
    )
    _title(panels[0], "before, as a CNN: {} products in weight layers", before)
    _title(panels[1], "after: {} multiplications (log scale)", left)
    _title(panels[2], "after: {} additions", additions)
    panels[0].set_yticks(range(len(found)), [bar.path for bar in found], fontsize=7)
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    figure.suptitle(_headline(cost, title), fontsize=10, x=0.01, ha="left", linespacing=1.4)
    handles, labels = panels[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    try:
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=target.suffix[1:].lower(), dpi=120)
    except OSError as error:
        raise AdderkitError(f"cannot write chart {str(target)!r}: {error}; give a writable file") from error


def _stack(axes: Any, parts: Sequence[tuple[Sequence[int], dict[str, str]]]) -> int:
    """Draw a stacked bar for each layer; return the total."""
    left = [0] * len(parts[0][0])
    for counts, style in parts:
        axes.barh(range(len(counts)), counts, left=left, height=0.78, edgecolor="#444444", linewidth=0.3, **style)
        left = [start + count for start, count in zip(left, counts, strict=True)]
    axes.set_xlim(0, 1.04 * max(left) or 1)
    return sum(left)


def _scatter(axes: Any, parts: Sequence[tuple[Sequence[int], dict[str, str], str]]) -> int:
    """Draw a mark for each layer and kind with a nonzero count, on a log scale; return the total."""
    axes.set_xscale("log")
    for counts, style, marker in parts:
        rows = [row for row, count in enumerate(counts) if count]
        values = [counts[row] for row in rows]
        axes.scatter(
            values, rows, s=26, marker=marker, color=style["color"], edgecolor="#222222", linewidth=0.5, zorder=2
        )
    found = [count for counts, _, _ in parts for count in counts if count]
    axes.set_xlim(min([100, *found]) / 2, 4 * max([2500, *found]))
    return sum(found)


def _title(axes: Any, text: str, total: int) -> None:
    from matplotlib.ticker import EngFormatter

    engineering = EngFormatter(sep=" ")
    axes.set_title(text.format(EngFormatter(places=2, sep=" ")(total)), fontsize=10, loc="left")
    axes.xaxis.set_major_formatter(engineering)
    axes.tick_params(axis="x", labelsize=8, top=True, labeltop=True)
    axes.grid(axis="both", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)


def _headline(cost: Cost, title: str) -> str:
    honest = f"{cost.honest_before.multiplications:,} multiplications before, {cost.multiplications:,} after"
    papers = f"{cost.headline_before.multiplications:,} and {cost.headline.multiplications:,}"
    shape = "x".join(map(str, cost.input_shape))
    return (
        f"{title}, one image of {shape}: {honest}, all operations\n"
        f"(as in papers, weight layers only, the first and last counted as adder layers: {papers})"
    )
