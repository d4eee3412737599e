import xml.etree.ElementTree as ElementTree

import pytest

from shoal.report.figures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, bar_chart, heat_map, line_chart, ticks


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 9, [0, 2, 4, 6, 8, 10]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (0, 12000, [0, 5000, 10000, 15000]),
    ],
)
def test_ticks_are_round_and_span_the_data(low, high, expected):
    assert ticks(low, high) == expected


def test_lines_are_drawn_where_the_numbers_say():
    svg = ElementTree.fromstring(line_chart("t", "x", "y", [Series("a", [(0, 0.0), (10, 1.0)])]))
    points = svg.find("polyline").get("points").split()
    assert points[0] == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f}"
    assert points[1] == f"{WIDTH - RIGHT:.1f},{TOP:.1f}"


def test_the_band_spans_the_seeds():
    chart = line_chart("t", "x", "y", [Series("a", [(0, 0.0), (1, 1.0)]), Series("b", [(0, 0.5), (1, 0.5)])], band=True)
    points = ElementTree.fromstring(chart).find("polygon").get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    assert heights == [middle, TOP, middle, HEIGHT - BOTTOM]


def test_bars_are_as_high_as_their_values():
    svg = ElementTree.fromstring(bar_chart("t", "y", [("a", [1.0, 0.5])], ["before", "after"]))
    heights = [float(bar.get("height")) for bar in svg.findall("rect")]
    assert heights[0] == pytest.approx(2 * heights[1])


def test_hostile_names_stay_text():
    chart = line_chart("<script>", "x", "y", [Series("</svg><script>alert(1)</script>", [(0, 1.0), (1, 2.0)])])
    assert "<script>" not in chart and ElementTree.fromstring(chart) is not None


def test_nothing_to_draw_gives_nothing():
    assert (
        line_chart("t", "x", "y", [Series("a", [])]) == ""
        and bar_chart("t", "y", [], ["a"]) == ""
        and heat_map("t", []) == ""
    )


def test_constant_and_single_values_can_be_drawn():
    assert "polyline" in line_chart("t", "x", "y", [Series("a", [(3, 0.0)])])
    assert heat_map("t", [[0.5, 0.5], [0.1, 0.9]]).count("<rect") == 4
