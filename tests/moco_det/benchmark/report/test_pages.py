"""What is put into a template is escaped; what comes out of one is not escaped again."""

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
