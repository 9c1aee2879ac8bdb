"""report.html of a reproduction: well-formed, self-contained, and what is in its cells."""

import re

import pytest
from html_page import Page

from moco_det.benchmark.report import table_page
from moco_det.benchmark.report.samples import Sample


def cell(**changes):
    empty = {"published": None, "mean": None, "sd": None, "n": 0, "values": {}}
    return empty | {"from_published": None, "from_reference": None} | changes


def difference(value, marked):
    return {"value": value, "spread": 1.0, "marked": marked}


@pytest.fixture
def table():
    part = {"experiment": "voc", "columns": ["AP"], "reference": "super", "trials": 5}
    full = cell(
        published=54.0, mean=56.25, sd=0.14, n=2, values={1: 56.15, 2: 56.35},
        from_published=difference(2.25, True), from_reference=difference(-0.31, False),
    )  # fmt: skip
    single = cell(mean=40.0, n=1, values={1: 40.0})
    return {
        "name": "3",
        "title": "Table <3>",
        "source": "a paper",
        "stamps": ["Shortened schedule: 10 & 20."],
        "parts": [part | {"heading": "DC5"}, part | {"heading": "C4"}],
        "rows": [
            {"row": "super", "label": "super.", "runs": [{"finished": 2}] * 2,
             "cells": [[full], [cell()]]},
            {"row": "mine", "label": "<mine>", "runs": [{"finished": 1}, {"finished": 0}],
             "cells": [[single], [cell(published=12.5)]]},
        ],
    }  # fmt: skip


@pytest.fixture
def results(table):
    record = {
        "command": "python x '<y>'",
        "engine": "native",
        "attempts": [{}],
        "seconds": 3725.0,
        "code": {"commit": "abc"},
        "packages": {"torch": "2"},
        "hardware": {"processor": "a CPU"},
    }
    run = {"name": "voc/super/trial1", "row": "super", "state": "finished", "record": record}
    todo = {"name": "voc/mine/trial1", "row": "mine", "state": "to do", "record": {}}
    return {
        "title": "A title",
        "created": "today",
        "checkpoints": {"mine": "/a/b.pth"},
        "tables": [table],
        "runs": [run, todo],
    }


def render(results):
    curves = {"voc": {"super": [[(20, 2.0), (40, 1.0)]], "mine": [[]]}}
    pictures = {"voc": [[Sample("7", None, "data:,a"), Sample("7", "super", "data:,b")]], "x": []}
    return table_page.render(results, curves, pictures)


def test_page_is_well_formed_and_fetches_nothing(results):
    text = render(results)
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags and "url(" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.ids)
    assert 'name="viewport"' in text


def cells_of(table):
    """The texts of each cell, joined by |, without the two lines of headings."""
    rows = re.findall(r"<tr>(.*?)</tr>", table_page.table_html(table))
    return [
        [re.sub(r"(<[^>]+>)+", "|", c).strip("|") for c in re.findall(r"<td>.*?</td>", row)]
        for row in rows[2:]
    ]


def test_cells_hold_ours_the_papers_and_both_differences(table):
    first, second = cells_of(table)
    assert first == ["56.2| ± 0.1|paper 54.0|to paper +2.2*|gap −0.3", ""]
    assert second == ["40.0", "paper 12.5"]  # one run: no deviation; none: the paper's alone


def test_only_what_exceeds_chance_is_marked(table):
    text = table_page.table_html(table)
    assert re.findall(r'class="sub marked">([^<]*)<', text) == ["to paper +2.2*"]


def test_headings_number_of_runs_and_stamps(results):
    text = render(results)
    page = Page(text)
    assert "DC5 C4 pre-train AP AP" in page.text
    assert "super. n = 2" in page.text and "<mine> n = 1 / 0" in page.text
    assert '<p class="stamp">Shortened schedule: 10 &amp; 20.</p>' in text
    assert "paper: a paper; gap: to super." in page.text


def test_runs_say_what_they_were(results):
    words = Page(render(results)).text
    assert "1 of 2 runs are finished" in words
    assert "voc/super/trial1 finished native 1 h 02 min" in words
    assert "python x '<y>'" in words and "commit abc" in words


def test_pictures_name_their_row(results):
    text = render(results)
    assert '<img src="data:,a" alt="Image 7, truth">' in text
    assert '<img src="data:,b" alt="Image 7, super.">' in text
    assert "<h3>x</h3>" not in text
