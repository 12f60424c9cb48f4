"""Plots of a run: loss, accuracy and learning rate by epoch, and the scale of each layer's weights and gradients."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...convert.files import atomic_path
from .layer_scales import LayerScales
from .state import Row

# Colors that color-blind readers tell apart (Okabe and Ito, jfly.uni-koeln.de/color).
LINES = {
    "loss": {
        "train_loss": ("training", "#0072B2"),
        "eval_loss": ("validation", "#D55E00"),
        "eval_loss_ema": ("validation, moving average", "#009E73"),
    },
    "accuracy": {
        "eval_top1": ("top-1", "#D55E00"),
        "eval_top5": ("top-5", "#56B4E9"),
        "eval_top1_ema": ("top-1, moving average", "#009E73"),
        "eval_top5_ema": ("top-5, moving average", "#000000"),
    },
    "learning_rate": {"lr": ("learning rate", "#0072B2")},
}
TITLES = {"loss": "loss", "accuracy": "accuracy (%)", "learning_rate": "learning rate"}
_SCALES = {
    "weight_scale": ("weight_rms", "root mean square of each layer's weights"),
    "gradient_scale": ("gradient_norm", "norm of each layer's gradient, before the adaptive rate"),
}
_NAMED = 8  # layers that a legend still names


def draw_plots(rows: Sequence[Row], layers: Sequence[str], samples: Sequence[LayerScales], folder: Path) -> None:
    """Draw all plots.

    Args:
        rows: Rows of ``summary.csv``, one per epoch.
        layers: Names of the sampled layers, in the model's order.
        samples: Samples of the layers' scales, one per epoch.
        folder: Folder that receives ``loss.png``, ``accuracy.png``, ``learning_rate.png``, ``weight_scale.png`` and
            ``gradient_scale.png``.
    """
    for name, lines in LINES.items():
        figure, axes = _figure(TITLES[name])
        for column, (label, color) in lines.items():
            if rows and column in rows[0]:
                axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], label=label, color=color,
                          marker="o", markersize=_marker(rows))  # fmt: skip
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        _save(figure, folder / f"{name}.png")
    for name, (column, title) in _SCALES.items():
        _draw_scales(column, title, layers, samples, folder / f"{name}.png")


def _draw_scales(column: str, title: str, layers: Sequence[str], samples: Sequence[LayerScales], target: Path) -> None:
    """Draw a line for each layer, colored by its depth; with many layers, only the first and the last are named."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    named = len(layers) <= _NAMED
    figure, axes = _figure(title if named else f"{title} ({len(layers)} layers)", right=0.73)
    shades, last = colormaps["viridis"].resampled(256), max(1, len(layers) - 1)
    epochs = [sample["epoch"] for sample in samples]
    for index, layer in enumerate(layers):
        values: list[float] = [sample[column][index] for sample in samples]  # type: ignore[literal-required]
        # A logarithmic axis cannot show 0.
        shown = [value if value > 0 and math.isfinite(value) else math.nan for value in values]
        axes.plot(epochs, shown, color=shades(0.92 * index / last), label=layer, marker="o", linewidth=1.2,
                  markersize=_marker(samples))  # fmt: skip
    finite = [value for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
    if finite:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if max(finite) < 50 * min(finite) else "")
    if layers and named:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif layers:
        bar = figure.colorbar(
            ScalarMappable(Normalize(0, last / 0.92), shades),
            cax=figure.add_axes((0.76, 0.13, 0.025, 0.78)),
            boundaries=range(last + 2),
        )
        bar.set_ticks([0.5, last + 0.5], labels=[layers[0], layers[-1]], fontsize="small")
    _save(figure, target)


def _figure(title: str, right: float = 0.97) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, right - 0.09, 0.78))  # fixed: fitting the margins would double the time
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _marker(points: Sequence[Any]) -> float:
    """Return the size of markers, which are drawn only where points are few."""
    return 3.5 if len(points) <= 30 else 0.0


def _save(figure: Any, target: Path) -> None:
    for axes in figure.axes[:1]:
        first, last = axes.dataLim.intervalx
        if first == last:  # one epoch: no fractions of it on the axis
            axes.set_xlim(first - 0.5, last + 0.5)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
