"""A finished run's files read back; its statistics by hand; a well-formed, self-contained page."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from html_page import Page
from markupsafe import Markup

from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import RunFolder
from moco_det.benchmark.report import quickstart
from moco_det.benchmark.report.pages import JudgedPicture, duration
from moco_det.benchmark.report.quickstart import DetectorPair, Pretraining
from moco_det.benchmark.significance import signed
from moco_det.benchmark.synthetic import images
from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset

# By hand: means (40+30)/2 and (52+36)/2; differences 12 and 6, their mean 9 and, with n - 1 = 1,
# their standard deviation sqrt(3^2 + 3^2) = 4.24. Variances 50 and 128, pooled (1 + 1 degrees of
# freedom) 89; t = 4.303: the difference of the means is 9 +- 4.303 sqrt(89 (1/2 + 1/2)) = 40.59.
DETECTION = [
    DetectorPair(
        seed=5,
        random={"AP": 20.0, "AP50": 40.0, "AP75": 11.0},
        moco={"AP": 25.5, "AP50": 52.0, "AP75": 13.0},
    ),
    DetectorPair(
        seed=6,
        random={"AP": 18.0, "AP50": 30.0, "AP75": 12.0},
        moco={"AP": 21.0, "AP50": 36.0, "AP75": 11.5},
    ),
]
RESULTS = quickstart.Results(
    title="A title <with> & signs",
    created="1 May 2026, 10:00",
    seconds=485.4,
    data={"Classes": "<b>cat</b> & dog"},
    pretraining=Pretraining(
        loss=[[0.5, 6.0], [1.0, 6.5], [1.5, 5.0], [2.0, 4.0]],
        chance_loss=math.log(1025),
        knn=[[0, 21.25], [1, 40.0], [2, 63.75]],
        knn_chance=12.5,
    ),
    detection=DETECTION,
    detection_loss={
        "random": [[[20, 3.0], [40, 2.0]], [[20, 3.1], [40, 2.2]]],
        "moco": [[[20, 2.5], [40, 1.5]], [[20, 2.4], [40, 1.4]]],
    },
    steps=[{"name": "pretrain", "command": "python x --y '<z>'", "seconds": 65.0}],
    environment={"processor": "A CPU, 2 cores", "torch": "2.9.9"},
    settings={"recipe.yaml": "lr: 0.06  # see https://example.org\n"},
)
PAIR = {
    "moco": JudgedPicture(Markup("<svg></svg>"), "1 of 2 objects found"),
    "random": JudgedPicture(Markup("<svg></svg>"), "no <object>"),
}


def test_statistics_by_hand():
    ap50 = RESULTS.comparison("AP50")
    assert (ap50.random, ap50.moco, ap50.difference) == (35.0, 44.0, 9.0)
    assert ap50.differences == (12.0, 6.0)
    assert ap50.difference_sd == pytest.approx(math.sqrt(18))
    assert replace(RESULTS, detection=DETECTION[:1]).comparison("AP75").difference_sd is None


def test_the_verdict_is_that_of_a_reproduction_by_hand():
    ap50 = RESULTS.comparison("AP50")
    assert (ap50.random_summary.sd, ap50.moco_summary.sd) == pytest.approx((50**0.5, 128**0.5))
    assert ap50.gain.interval == pytest.approx((9 - 40.594, 9 + 40.594), abs=1e-3)
    assert not ap50.gain.significant


def test_json_has_the_promised_keys(tmp_path):
    quickstart.write_report(RESULTS, [], tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["seconds"] == 485.4
    assert content["knn_top1"] == {"random": 21.25, "moco": 63.75}
    assert content["ap50"] == {"random": 35.0, "moco": 44.0}
    assert content["detection"] == [asdict(pair) for pair in DETECTION]
    assert content["ap50_difference"] == {
        "mean": 9.0,
        "standard_deviation": pytest.approx(18**0.5),
        "n": 2,
        "interval": pytest.approx([-31.594, 49.594], abs=1e-3),
        "significant": False,
    }
    assert content["ap50_summary"]["moco"] == {"mean": 44.0, "sd": pytest.approx(128**0.5), "n": 2}
    assert set(content) == {
        *("seconds", "knn_top1", "ap50", "ap50_difference", "ap50_summary", "title", "created"),
        "data",
        *("pretraining", "detection", "detection_loss", "steps", "environment"),
    }
    assert set(content["pretraining"]) == {"loss", "chance_loss", "knn", "knn_chance"}


def test_page_is_well_formed_and_fetches_nothing():
    text = quickstart.render_page(RESULTS, [PAIR])
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r'aria-labelledby="(.*?)"', text)) <= set(page.ids)


def test_every_number_is_on_the_page():
    text = Page(quickstart.render_page(RESULTS, [])).text
    values = [v for pair in DETECTION for side in (pair.random, pair.moco) for v in side.values()]
    for value in (*values, 35.0, 44.0, 21.2, 63.8):
        assert f"{value:.1f}" in text
    for difference in ("+12.0", "+6.0", "+9.0", "−0.5", "+42.5", "4.2 points"):
        assert difference in text
    for words in ("44.0 ± 11.3", "35.0 ± 7.1", "−31.6 to +49.6", "guessing: 12.5 %"):
        assert words in text
    for words in ("8 min 05 s", "1 min 05 s", "2.9.9", "A CPU, 2 cores", "seed 5", "seed 6"):
        assert words in text


def test_what_users_name_is_escaped():
    page = Page(quickstart.render_page(RESULTS, [PAIR]))
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
    values = {"AP": 9.0, "AP75": 9.0}
    detection = [
        DetectorPair(i, values | {"AP50": 40.0}, values | {"AP50": 40.0 + gain})
        for i, gain in enumerate(gains)
    ]
    text = Page(quickstart.render_page(replace(RESULTS, detection=detection), [])).text
    assert words in text
    assert ("higher" in text) == (sum(gains) > 0)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    # Two equal pairs have no deviation; the third's margin is 4.303 sqrt(50/2 (1/2 + 1/2)) = 21.5.
    [([4, 4], "MoCo helps: "), ([-4, -4], "MoCo hurts: "), ([1, 11], "Not settled: ")],
)
def test_the_verdict_follows_the_interval(gains, verdict):
    values = {"AP": 9.0, "AP75": 9.0, "AP50": 40.0}
    detection = [
        DetectorPair(i, values, values | {"AP50": 40.0 + gain}) for i, gain in enumerate(gains)
    ]
    text = Page(quickstart.render_page(replace(RESULTS, detection=detection), [])).text
    assert verdict in text
    assert ("does not hold zero" in text) == (verdict != "Not settled: ")


def test_without_classes_to_guess_among_there_is_no_chance():
    unknown = replace(RESULTS, pretraining=replace(RESULTS.pretraining, knn_chance=None))
    assert "guessing: 12.5" not in Page(quickstart.render_page(unknown, [])).text


def test_without_a_knn_monitor_the_report_says_so(tmp_path):
    unmonitored = replace(RESULTS, pretraining=replace(RESULTS.pretraining, knn=[]))
    quickstart.write_report(unmonitored, [], tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["knn_top1"] == {
        "random": None,
        "moco": None,
    }
    assert "The kNN monitor did not run" in (tmp_path / "report.html").read_text()


def test_small_texts():
    assert [signed(v) for v in (1.26, -1.26, 0.01, -0.04)] == ["+1.3", "−1.3", "0.0", "0.0"]
    assert [duration(s) for s in (42.4, 60, 485.4)] == ["42 s", "1 min 00 s", "8 min 05 s"]


# -- from the files of a finished run -------------------------------------------------------------


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_pretraining_curves(tmp_path):
    lines = [
        {"step": 0, "epoch": 0, "knn_top1": 20.0},
        {"step": 1, "epoch": 0.5, "loss": 6.0, "chance_loss": 6.9},
        {"step": 2, "epoch": 1.0, "loss": 5.0, "chance_loss": 6.9},
        {"step": 2, "epoch": 1, "knn_top1": 31.5},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    read = quickstart.read_pretraining(tmp_path / "metrics.jsonl", tmp_path / "images")
    assert read == Pretraining(
        loss=[[0.5, 6.0], [1.0, 5.0]], chance_loss=6.9, knn=[[0, 20.0], [1, 31.5]]
    )
    for name in ("cat", "cow", "dog", "emu"):
        (tmp_path / "images/val" / name).mkdir(parents=True)
    read = quickstart.read_pretraining(tmp_path / "metrics.jsonl", tmp_path / "images")
    assert read.knn_chance == 25.0


@pytest.fixture
def folder(tmp_path):
    experiment = Experiment("quickstart", "", 0, 0, 1)
    return RunFolder(Run(experiment, "moco", 0, Path("c.yaml"), ()), tmp_path)


def test_detector_numbers_are_those_of_the_last_evaluation(folder):
    first = {"iteration": 39, "bbox/AP": 1.0, "bbox/AP50": 2.0, "bbox/AP75": 3.0}
    last = {"iteration": 40, "bbox/AP": 4.0, "bbox/AP50": 5.0, "bbox/AP75": 6.0, "bbox/AP-x": None}
    write_lines(folder.path / "metrics.json", [first, last])
    assert quickstart.read_ap(folder) == {"AP": 4.0, "AP50": 5.0, "AP75": 6.0}


def test_a_detector_without_evaluation_is_named(folder):
    write_lines(folder.path / "metrics.json", [{"iteration": 19, "lr": 0.1, "total_loss": 2.5}])
    with pytest.raises(UserError, match="no 'bbox/AP'"):
        quickstart.read_ap(folder)


def test_pairs_show_true_boxes_and_both_detectors(tmp_path):
    images.write_voc_scenes(tmp_path, "test", seed=0, count=2)
    dataset = get_dataset(f"voc:{tmp_path / 'scenes'}:test")
    record = dataset.records()[0]
    boxes = [a["bbox"] for a in record["annotations"]]
    total = len(boxes)
    perfect = {
        "boxes": boxes,
        "classes": [a["category_id"] for a in record["annotations"]],
        "scores": [1.0] * total,
    }
    nothing = {"boxes": np.zeros((0, 4)), "classes": np.zeros(0, int), "scores": np.zeros(0)}
    found = {"moco": {record["image_id"]: perfect}, "random": {record["image_id"]: nothing}}
    pair = quickstart.draw_pair(record, found, dataset.classes)
    assert pair["moco"].words == f"{total} of {total} objects found, 0 false detections"
    assert pair["random"].words == f"0 of {total} objects found, 0 false detections"
    assert pair["moco"].svg.count('class="right"') == total
    assert pair["random"].svg.count('class="truth"') == total


def test_without_its_images_a_run_has_no_pictures(tmp_path, capsys):
    plan = SimpleNamespace(test=f"voc:{tmp_path / 'gone'}:test")
    assert quickstart.draw_pairs(plan) == []
    assert capsys.readouterr().out.startswith("warning: the report has no pictures: ")
