"""Charts as SVG: places follow the numbers, whatever these are."""

import math
import re
from xml.etree import ElementTree

import pytest

from adderkit.recipes.reporting.markup import Html, tag
from adderkit.recipes.reporting.parts import engineering
from adderkit.recipes.reporting.svg_charts import Line, bar, line_chart


def drawn(*series, epochs=None):
    """The chart as a tree, which also says that it is well-formed."""
    lines = [Line(f"line {index}", "#000000", values) for index, values in enumerate(series)]
    return ElementTree.fromstring(line_chart("loss", epochs or list(range(len(series[0]))), lines))


def texts(tree):
    return [element.text for element in tree.iter("text")]


def test_points_lie_where_the_axis_says():
    tree = drawn([2.0, 4.0, 3.0])
    (points,) = [line.get("points") for line in tree.iter("polyline")]
    heights = [float(pair.split(",")[1]) for pair in points.split()]
    labels = {text.text: float(text.get("y")) - 4 for text in tree.iter("text") if text.get("text-anchor") == "end"}
    for value, height in zip((2, 4, 3), heights, strict=True):
        assert height == pytest.approx(labels[f"{value:.1f}"], abs=0.1)
    assert texts(tree)[-4:] == ["0", "1", "2", "epoch"]


def test_gaps_dots_and_keys():
    nan = math.nan
    tree = drawn([1.0, 2.0, nan, 3.0, nan, 4.0, 5.0], [nan] * 6 + [2.0])
    assert [len(line.get("points").split()) for line in tree.iter("polyline")] == [2, 2]
    assert len(list(tree.iter("circle"))) == 6
    assert [span.find("svg").tail for span in tree.iter("span")] == ["line 0", "line 1"]
    assert list(drawn([1.0, 2.0]).iter("span")) == []
    many = drawn([float(value) for value in range(100)])
    assert list(many.iter("circle")) == []


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [0.0, 0.0], [-3.0, 7.0], [1e-9, 2e-9], [1e29, -1e29], [0.12678, 0.12679], [1e15, 1e15 + 1],
     [2.5e-320, 1.0], [5e-324], [1e-310], [1e-5] * 3, [92.05, 92.07], [99.99, 100.0, 0.1]],
    ids=str,
)  # fmt: skip
def test_odd_ranges(values):
    """Everything stays within the drawing, and no two ticks of an axis are the same."""
    tree = drawn(values)
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in tree.iter("circle")]
    assert len(places) == len(values)
    assert all(50 <= x <= 350 and 8 <= y <= 174 for x, y in places)
    levels = [text.text for text in tree.iter("text") if text.get("text-anchor") == "end"]
    assert 2 <= len(levels) <= 8
    assert len(set(levels)) == len(levels)
    assert max(map(len, levels)) <= 9


@pytest.mark.parametrize(("epochs", "values"), [([], []), ([0, 1], [math.nan, math.inf])])
def test_nothing_to_draw(epochs, values):
    assert line_chart("loss", epochs, [Line("a", "#000000", values)]) == ""


def test_marks_are_few_and_whole():
    for count in (1, 2, 7, 30, 300, 2999):
        marks = texts(drawn([1.0] * count))[-7:-1]
        numbers = [int(mark) for mark in marks if mark.isdigit()]
        assert 1 <= len(numbers) <= 6


def test_bars():
    tree = ElementTree.fromstring(bar([(1.0, "before"), (0.25, "after"), (0.0, "x"), (1e-9, "y"), (7.0, "z")], "a<b"))
    assert tree.get("aria-label") == "a<b"
    assert [(box.get("class"), box.get("width")) for box in tree.iter("rect")] == [
        ("before", "100.00%"), ("after", "25.00%"), ("y", "0.40%"), ("z", "100.00%")
    ]  # fmt: skip
    assert [float(box.get("y")) for box in tree.iter("rect")] == [0, 8, 24, 32]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1.00"), (640, "640"), (999.4, "999"), (999.6, "1.00 k"), (31_022_016, "31.0 M"), (4.1e9, "4.10 G"),
     (5e15, "5.00e+03 T"), (-2000, "-2.00 k"), (1e-12, "1e-12")],
)  # fmt: skip
def test_engineering(value, text):
    assert engineering(value) == text
    if "e" not in text:
        assert engineering(value, "J") == (f"{text}J" if re.search(r"[kMG]$", text) else f"{text} J")


def test_text_becomes_markup_only_when_escaped():
    assert tag("p", "<b>&", Html("<i>"), 5, class_='"x"') == '<p class="&quot;x&quot;">&lt;b&gt;&amp;<i>5</p>'
    assert tag("img", alt="a\u202e\x00\ud800b\n", src=None) == '<img alt="a���b ">'
    assert len(tag("p", "<" * 10**6)) < 5000
