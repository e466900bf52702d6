"""Charts are well-formed SVG with the points where they belong."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from s2srm.report.charts import Series, line_chart, nice_ticks


def points(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in found.split()]  # type: ignore[misc]
        for found in re.findall(r'points="([^"]*)"', svg)
    ]


def test_chart_is_xml_with_escaped_text():
    svg = line_chart("a < b & c", [Series('x "1" <y>', [1, 2], [0.5, 1.5], 0)])
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root[0].text == "a < b & c"


def test_larger_values_are_drawn_higher_and_later_steps_further_right():
    (line,) = points(line_chart("t", [Series("s", [0, 10, 20], [1.0, 3.0, 2.0], 0)]))
    assert line[0][0] < line[1][0] < line[2][0]
    assert line[1][1] < line[2][1] < line[0][1]


def test_series_share_the_axes():
    first, second = points(
        line_chart("t", [Series("a", [0, 1], [0.0, 1.0], 0), Series("b", [0, 1], [1.0, 2.0], 1)])
    )
    assert first[1][1] == second[0][1], "the same value is at the same height in both"


def test_one_point_becomes_a_dot():
    svg = line_chart("t", [Series("s", [5], [0.25], 2)])
    assert "<circle" in svg and "<polyline" not in svg
    assert "0.25 at 5" in svg


def test_a_constant_is_drawn():
    (line,) = points(line_chart("t", [Series("s", [1, 2], [3.0, 3.0], 0)]))
    assert line[0][1] == line[1][1]


def test_long_series_are_averaged_not_cut():
    steps = list(range(5000))
    (line,) = points(line_chart("t", [Series("s", steps, [float(s) for s in steps], 0)]))
    assert 200 <= len(line) <= 400
    assert line[-1][1] < line[0][1]


def test_an_empty_series_is_left_out_and_only_empty_ones_are_an_error():
    assert (
        len(points(line_chart("t", [Series("a", [], [], 0), Series("b", [1, 2], [1, 2], 1)]))) == 1
    )
    with pytest.raises(ValueError, match="no points"):
        line_chart("t", [Series("a", [], [], 0)])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.3, 0.2), (1e-7, 3e-7), (0, 98765), (5, 5), (0, 0), (-2, -1)]
)
def test_ticks_enclose_the_range_with_round_numbers(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 7
    steps = {round(b - a, 12) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
