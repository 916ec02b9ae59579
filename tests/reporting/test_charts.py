"""Charts: scales, ticks and what is drawn, against numbers worked out by hand."""

import re

import pytest

from cmtool.reporting.charts import HEIGHT, MOST_POINTS, WIDTH, Scale, Series, line_chart, number, thin, usable


def test_a_scale_puts_its_ends_on_its_pixels_and_the_middle_between():
    scale = Scale(0, 10, 100, 200)
    assert (scale(0), scale(5), scale(10)) == (100, 150, 200)
    log = Scale(0.01, 100, 0, 400, log=True)
    assert [log(v) for v in (0.01, 0.1, 1, 100)] == pytest.approx([0, 100, 200, 400])


def test_ticks_are_round_numbers_inside_the_range():
    assert Scale(0, 100, 0, 1).ticks() == pytest.approx([0, 20, 40, 60, 80, 100])
    assert Scale(0.961, 0.989, 0, 1).ticks() == pytest.approx([0.97, 0.98])
    assert Scale(0.008, 0.3, 0, 1, log=True).ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2])
    assert Scale(4.4, 5.9, 0, 1, log=True).ticks() == pytest.approx([4.5, 5, 5.5])  # 5 alone would say nothing
    assert Scale(1e-6, 1e3, 0, 1, log=True).ticks() == pytest.approx(
        [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1000]
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.002, "0.002"), (35, "35"), (12_000, "12k"), (1.5e6, "1.5M"), (2e-5, "2e-05")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_thinning_keeps_means():
    points = [(float(i), float(i % 2)) for i in range(10 * MOST_POINTS)]
    kept = thin(points)
    assert len(kept) == MOST_POINTS
    assert kept[0] == (4.5, 0.5)
    assert thin(points[:5]) == points[:5]


def test_what_cannot_be_drawn_is_left_out():
    points = [(1, 2.0), (2, None), (3, float("nan")), (4, 0.0), (5, float("inf"))]
    assert usable(points) == ((1.0, 2.0), (4.0, 0.0))
    assert usable(points, log=True) == ((1.0, 2.0),)
    assert line_chart("empty", [Series("a", ()), Series("b", usable([(1, None)]))]) == ""


def test_a_line_stays_inside_the_chart_and_its_legend_says_the_last_value():
    chart = line_chart("Loss <&>", [Series("a<b", tuple((float(x), 1 / x) for x in range(1, 50)))], log=True)
    assert "a&lt;b" in chart and "Loss &lt;&amp;&gt;" in chart and "<b>0.02041</b>" in chart
    points = re.search(r'polyline class="line c0" points="([^"]+)"', chart)[1]
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    assert len(places) == 49
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert places[0][1] < places[-1][1]  # it falls: pixels count downwards


def test_one_point_is_a_dot_and_a_constant_line_is_drawn():
    assert "<circle" in line_chart("one", [Series("a", ((3.0, 4.0),))])
    assert "polyline" in line_chart("flat", [Series("a", ((1.0, 0.0), (2.0, 0.0)))])
