"""What is put into a template is escaped once; ticks by hand; a point's place in the SVG by the
axes' own arithmetic."""

import re

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from moco_det.benchmark.report import pages

CHART = {
    "title": "<T>", "description": 'a "D"', "width": 10, "height": 10, "left": 1, "ticks": [],
    "rows": [("<row>", 1.0, 2.0)], "pitch": 1.0, "x": float, "tick_text": str,
}  # fmt: skip


def test_texts_are_escaped_once():
    text = pages.render("dumbbell_chart.svg.j2", **CHART)
    assert isinstance(text, Markup)
    assert ">&lt;row&gt;</text>" in text
    assert 'aria-label="&lt;T&gt;. a &#34;D&#34;"' in text
    assert Markup("{}").format(text) == text


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="pitch"):
        pages.render("dumbbell_chart.svg.j2", **{k: v for k, v in CHART.items() if k != "pitch"})


def test_durations():
    seconds = (42.4, 60, 485.4, 3725)
    texts = ["42 s", "1 min 00 s", "8 min 05 s", "1 h 02 min"]
    assert [pages.duration(each) for each in seconds] == texts


# -- charts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 63.7, [0, 20, 40, 60, 80]),
        (5.2, 7.1, [5, 5.5, 6, 6.5, 7, 7.5]),
        (3, 3, [2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6]),
        (-0.3, 0.3, [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, ticks):
    got = pages.nice_ticks(low, high)
    assert got[0] <= low
    assert got[-1] >= high
    if low < high:
        assert got == pytest.approx(ticks)


def test_tick_text():
    texts = [pages.tick_text(v) for v in (20.0, 0.25, 1500, 0)]
    assert texts == ["20", "0.25", "1,500", "0"]


def test_points_lie_where_the_axes_say():
    line = ("moco", [(0, 0), (10, 50), (20, 100)])
    svg = pages.line_chart("T", "D", [line], "x", "y", percent=True)
    points = re.search(r'points="(.*?)"', svg)[1].split()
    left, right = pages.LEFT, pages.WIDTH - pages.RIGHT
    top, bottom = pages.TOP, pages.HEIGHT - pages.BOTTOM
    expected = [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]
    got = [tuple(map(float, p.split(","))) for p in points]
    assert got == [pytest.approx(e, abs=0.06) for e in expected]


def test_percent_charts_start_at_zero():
    line = ("moco", [(0, 60.0), (1, 62.0)])
    assert ">0</text>" in pages.line_chart("T", "D", [line], "x", "y", percent=True)


def test_dumbbell_names_its_values():
    svg = pages.dumbbell_chart("T", "D", [("seed 0", 30.04, 42.0), ("mean", 30.04, 42.0)])
    assert svg.count(">30.0</text>") == svg.count(">42.0</text>") == 2


def test_a_value_at_the_last_tick_of_a_dumbbell_stays_inside():
    svg = pages.dumbbell_chart("T", "D", [("mean", 10.0, 100.0)])
    (start,) = re.findall(r'class="value moco start" x="([\d.]+)"', svg)
    assert float(start) + len("100.0") * 7.5 < pages.WIDTH  # 14 px bold, digits 7.5 wide
