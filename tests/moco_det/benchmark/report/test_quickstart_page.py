"""The report: well-formed, self-contained, its statistics equal to values worked out by hand."""

import copy
import json
import math
import re

import pytest
from html_page import Page

from moco_det.benchmark.report import quickstart_page as report

# By hand: means (40+30)/2 and (52+36)/2; differences 12 and 6, their mean 9 and, with n - 1 = 1,
# their standard deviation sqrt(3^2 + 3^2) = 4.24.
DETECTION = [
    {
        "seed": 5,
        "random": {"AP": 20.0, "AP50": 40.0, "AP75": 11.0},
        "moco": {"AP": 25.5, "AP50": 52.0, "AP75": 13.0},
    },
    {
        "seed": 6,
        "random": {"AP": 18.0, "AP50": 30.0, "AP75": 12.0},
        "moco": {"AP": 21.0, "AP50": 36.0, "AP75": 11.5},
    },
]


def results():
    return {
        "title": "A title <with> & signs",
        "created": "1 May 2026, 10:00",
        "seconds": 485.4,
        "data": {"Classes": "<b>cat</b> & dog"},
        "pretraining": {
            "loss": [[0.5, 6.0], [1.0, 6.5], [1.5, 5.0], [2.0, 4.0]],
            "chance_loss": math.log(1025),
            "knn": [[0, 21.25], [1, 40.0], [2, 63.75]],
        },
        "detection": copy.deepcopy(DETECTION),
        "detection_loss": {
            "random": [[[20, 3.0], [40, 2.0]], [[20, 3.1], [40, 2.2]]],
            "moco": [[[20, 2.5], [40, 1.5]], [[20, 2.4], [40, 1.4]]],
        },
        "steps": [{"name": "pretrain", "command": "python x --y '<z>'", "seconds": 65.0}],
        "environment": {"processor": "A CPU, 2 cores", "torch": "2.9.9"},
        "settings": {"recipe.yaml": "lr: 0.06  # see https://example.org\n"},
    }


PAIR = report.Pair("007", "<svg></svg>", "1 of 2 objects found", "<svg></svg>", "no <object>")


def test_statistics_by_hand():
    ap50 = report.compare(DETECTION, "AP50")
    assert (ap50.random, ap50.moco, ap50.difference) == (35.0, 44.0, 9.0)
    assert ap50.differences == (12.0, 6.0)
    assert ap50.spread == pytest.approx(math.sqrt(18))
    assert report.compare(DETECTION[:1], "AP75").spread is None


def test_json_has_the_promised_keys(tmp_path):
    report.write_report(results(), [], tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["seconds"] == 485.4
    assert content["knn_top1"] == {"random": 21.25, "moco": 63.75}
    assert content["ap50"] == {"random": 35.0, "moco": 44.0}
    assert content["detection"] == DETECTION
    assert content["ap50_difference"]["mean"] == 9.0


def test_page_is_well_formed_and_fetches_nothing():
    text = report.render(results(), [PAIR])
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r'aria-labelledby="(.*?)"', text)) <= set(page.ids)


def test_every_number_is_on_the_page():
    text = Page(report.render(results(), [])).text
    values = [v for run in DETECTION for side in ("random", "moco") for v in run[side].values()]
    for value in (*values, 35.0, 44.0, 21.2, 63.8):
        assert f"{value:.1f}" in text
    for difference in ("+12.0", "+6.0", "+9.0", "−0.5", "+42.5", "4.2 points"):
        assert difference in text
    for words in ("8 min 05 s", "1 min 05 s", "2.9.9", "A CPU, 2 cores", "seed 5", "seed 6"):
        assert words in text


def test_what_users_name_is_escaped():
    page = Page(report.render(results(), [PAIR]))
    assert "b" not in page.tags
    for words in ("A title <with> & signs", "<b>cat</b> & dog", "--y '<z>'", "no <object>"):
        assert words in page.text


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([12, 6], "MoCo is ahead in each of the 2 seeds"),
        ([12, -6], "MoCo is ahead in 1 of 2 seeds: the sign is not settled"),
        ([-1, -2], "MoCo is ahead in none of the 2 seeds: here it did not help"),
        ([4], "This is one seed: a single pair cannot tell an effect from luck"),
    ],
)
def test_words_follow_the_numbers(gains, words):
    run = results()
    values = {"AP": 9.0, "AP75": 9.0}
    run["detection"] = [
        {"seed": i, "random": values | {"AP50": 40.0}, "moco": values | {"AP50": 40.0 + gain}}
        for i, gain in enumerate(gains)
    ]
    text = " ".join(report.reading(run))
    assert words in text
    assert ("higher" in text) == (sum(gains) > 0)


def test_without_a_knn_monitor_the_report_says_so(tmp_path):
    run = results()
    run["pretraining"]["knn"] = []
    report.write_report(run, [], tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["knn_top1"] == {
        "random": None,
        "moco": None,
    }
    assert "The kNN monitor did not run" in (tmp_path / "report.html").read_text()


def test_small_texts():
    assert [report.signed(v) for v in (1.26, -1.26, 0.01, -0.04)] == ["+1.3", "−1.3", "0.0", "0.0"]
    assert [report.duration(s) for s in (42.4, 60, 485.4)] == ["42 s", "1 min 00 s", "8 min 05 s"]
