"""Charts of the report page as inline SVG: sharp on a phone and on paper, without an image file or a script."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .markup import Html, join, tag

_WIDTH, _HEIGHT = 360.0, 210.0  # SVG units; about the pixels of a phone, so that text keeps its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 8.0, 36.0  # margins
_FLAT = 0.05  # smallest range of an axis relative to its values, so that noise does not look like a change
_DIGITS, _LARGE = 4, 1e6  # most decimals, and the first number in scientific notation
_VISIBLE = 0.4  # percent of the width: the narrowest bar of a value above zero


class Line(NamedTuple):
    """Line of a chart: label, color and a value for each epoch; ``nan`` for a missing value."""

    label: str
    color: str
    values: Sequence[float]


def line_chart(title: str, epochs: Sequence[float], lines: Sequence[Line]) -> Html:
    """Return a figure with a line for each series over the epochs; a value that is not finite leaves a gap."""
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    if not epochs or not finite:
        return Html()
    levels, marks = _levels(min(finite), max(finite)), _whole(min(epochs), max(epochs))
    largest, step = max(map(abs, levels)), levels[1] - levels[0]
    across = _Scale(min(epochs), max(epochs), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(levels[0], levels[-1], _HEIGHT - _BOTTOM, _TOP)
    drawing = tag(
        "svg",
        *(_level(up(value), _label(value, step, largest)) for value in levels),
        *(_text(f"{value:g}", across(value), _HEIGHT - _BOTTOM + 16, "middle") for value in marks),
        _text("epoch", (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, "middle"),
        *(_drawn(line, epochs, across, up) for line in lines),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{title} by epoch",
    )
    key = [tag("span", _swatch(line.color), line.label, class_="key") for line in lines if len(lines) > 1]
    return tag("figure", tag("figcaption", tag("strong", title), *key), drawing)


def bar(parts: Sequence[tuple[float, str]], label: str) -> Html:
    """Return thin bars, one below the other.

    Args:
        parts: Length from 0 to 1 and CSS class of each bar.
        label: Description for screen readers.
    """
    drawn = [
        tag("rect", y=8 * row, width=f"{max(_VISIBLE, 100 * min(share, 1)):.2f}%", height=7, class_=kind)
        for row, (share, kind) in enumerate(parts)
        if share > 0
    ]
    return tag("svg", *drawn, class_="bar", width="100%", height=8 * len(parts) - 1, role="img", aria_label=label)


class _Scale(NamedTuple):
    """Linear scale from values to positions in the drawing."""

    first: float
    last: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.last - self.first
        return self.start + (self.end - self.start) * ((value - self.first) / span if span else 0.5)


def _drawn(line: Line, epochs: Sequence[float], across: _Scale, up: _Scale) -> Html:
    pieces: list[list[str]] = [[]]
    for epoch, value in zip(epochs, line.values, strict=True):
        if math.isfinite(value):
            pieces[-1].append(f"{across(epoch):.1f},{up(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    dots = [point.split(",") for piece in pieces for point in piece if len(epochs) <= 30 or len(piece) == 1]
    return join(
        [
            *(tag("polyline", points=" ".join(piece), stroke=line.color) for piece in pieces if len(piece) > 1),
            *(tag("circle", cx=x, cy=y, r=2.5, fill=line.color) for x, y in dots),
        ]
    )


def _level(height: float, label: str) -> Html:
    across = tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{height:.1f}", y2=f"{height:.1f}")
    return join([across, _text(label, _LEFT - 6, height + 4, "end")])


def _text(text: str, x: float, y: float, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _swatch(color: str) -> Html:
    return tag("svg", tag("rect", width=12, height=12, rx=2, fill=color), width=12, height=12, aria_hidden="true")


def _levels(low: float, high: float) -> list[float]:
    """Return evenly spaced round numbers around a range; a very small range is widened, so that they differ."""
    span = max(high - low, _FLAT * max(abs(low), abs(high)) or 1.0)
    low -= (span - (high - low)) / 2
    step = _step(span)
    first = math.floor(low / step)
    return [index * step for index in range(first, max(first + 1, math.ceil((low + span) / step)) + 1)]


def _whole(first: float, last: float) -> list[float]:
    """Return evenly spaced whole numbers within a range of epochs."""
    step = max(1.0, _step(last - first or 1.0))
    return [index * step for index in range(math.ceil(first / step), math.floor(last / step) + 1)]


def _step(span: float) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that fits at most five times into a span."""
    size = 10.0 ** math.floor(math.log10(span / 5))
    return next(size * factor for factor in (1, 2, 5, 10, 20) if span <= 5.001 * size * factor)


def _label(value: float, step: float, largest: float) -> str:
    digits = max(0, -math.floor(math.log10(step)))
    return f"{value:,.{digits}f}" if digits <= _DIGITS and largest < _LARGE else f"{value:.3g}"
