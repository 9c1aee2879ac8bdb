"""COCO's box metrics: published and recorded numbers of the official tools, and hand cases."""

import json
import math
import re
from collections import defaultdict

import pytest
import record_coco_ap
from recording import read

from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def as_predictions(results, category_ids):
    """COCO's result format (XYWH, ids of the file) as predictions (XYXY, contiguous)."""
    rows = defaultdict(lambda: {"boxes": [], "scores": [], "classes": []})
    for result in results:
        x, y, width, height = result["bbox"]
        row = rows[result["image_id"]]
        row["boxes"].append([x, y, x + width, y + height])
        row["scores"].append(result["score"])
        row["classes"].append(category_ids.index(result["category_id"]))
    return [{"image_id": image_id, **row} for image_id, row in rows.items()]


def test_the_twelve_published_numbers(shared_data):
    folder = shared_data("cocoapi_eval")
    published = (folder / "val2014_fake_eval_res.txt").read_text().split("type=")
    (section,) = (part for part in published if part.startswith("bbox"))
    expected = [float(number) for number in re.findall(r"\] = (\d\.\d+)", section)]
    dataset = get_dataset(f"coco:{folder}/instances_val2014_100.json:{folder}")
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    found = evaluate(dataset, as_predictions(results, dataset.category_ids))["bbox"]
    assert [round(found[metric] / 100, 3) for metric in METRICS] == expected


def test_metrics_recorded_from_detectron2(tmp_path):
    content, detections = record_coco_ap.draw_case()
    (tmp_path / "a.json").write_text(json.dumps(content))
    rows = defaultdict(lambda: {"boxes": [], "scores": [], "classes": []})
    for image, label, score, *box in detections:
        for field, value in (("boxes", box), ("scores", score), ("classes", label)):
            rows[image][field].append(value)
    predictions = [{"image_id": image, **row} for image, row in rows.items()]
    found = evaluate(get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}"), predictions)["bbox"]
    expected = read("coco_ap")["bbox"]
    assert len(expected) == 6 + len(record_coco_ap.CATEGORIES)
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-9)


@pytest.fixture
def dataset(tmp_path):
    """Two classes with gaps in their ids; no "area", no "iscrowd", as in many users' files."""
    content = {
        "images": [{"id": 4, "file_name": "4.jpg", "height": 100, "width": 100}],
        "categories": [{"id": 2, "name": "ant"}, {"id": 8, "name": "bee"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 8, "bbox": [0, 0, 10, 10]},
            {"id": 2, "image_id": 4, "category_id": 8, "bbox": [20, 0, 10, 10]},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")


def predict(*rows):
    boxes, scores, classes = zip(*rows, strict=True)
    return [{"image_id": 4, "boxes": boxes, "scores": scores, "classes": classes}]


def test_all_found(dataset):
    found = evaluate(dataset, predict(([0, 0, 10, 10], 0.9, 1), ([20, 0, 30, 10], 0.8, 1)))["bbox"]
    assert (found["AP"], found["AP-bee"], found["APs"]) == pytest.approx((100, 100, 100))
    assert math.isnan(found["AP-ant"])  # no ground truth
    assert math.isnan(found["APl"])


def test_half_found(dataset):
    """Precision 1 at the 51 recall levels 0, .01, ..., .5 of 101. IoU .78 is enough for 6 of 10."""
    found = evaluate(dataset, predict(([0, 0, 10, 7.8], 0.9, 1)))["bbox"]
    assert found["AP50"] == pytest.approx(100 * 51 / 101)
    assert found["AP"] == pytest.approx(60 * 51 / 101)
    assert found["AR100"] == pytest.approx(30)


def test_no_detections_is_zero_not_an_error(dataset):
    empty = {"image_id": 4, "boxes": [], "scores": [], "classes": []}
    for predictions in ([], [empty]):
        found = evaluate(dataset, predictions)["bbox"]
        assert (found["AP"], found["AP50"], found["AP-bee"]) == (0, 0, 0)


def test_unknown_image_is_refused(dataset):
    with pytest.raises(ValueError, match=r"not in the data set: \[5\]"):
        evaluate(dataset, [{"image_id": 5, "boxes": [], "scores": [], "classes": []}])


def test_nothing_is_printed(dataset, capsys):
    evaluate(dataset, predict(([0, 0, 10, 10], 0.9, 1)))
    assert capsys.readouterr().out == ""
