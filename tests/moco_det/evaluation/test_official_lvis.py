"""LVIS's metrics against the official package, and against Detectron2's recorded numbers."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import record_lvis_ap
import torch
from pycocotools import mask as coco_mask
from recording import read

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate
from moco_det.evaluation.predictions import prediction_record

pytest.importorskip("faster_coco_eval", reason="the extra [lvis]")

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


@pytest.fixture
def recorded(tmp_path):
    """The data set and the predictions of `record_lvis_ap`."""
    content, detections = record_lvis_ap.draw_case()
    (tmp_path / "a.json").write_text(json.dumps(content))
    predictions = [
        prediction_record(found.pop("image_id"), {k: torch.tensor(v) for k, v in found.items()})
        for found in detections
    ]
    return get_dataset(f"lvis:{tmp_path}/a.json:{tmp_path}"), predictions


@pytest.fixture
def photographs(shared_data):
    """Ten images of LVIS v0.5."""
    folder = shared_data("lvis_v0.5_val100")
    return get_dataset(f"lvis:{folder}/lvis_val_10_with_images.json:{folder}/val2017_10images")


def as_found(record, shift=0):
    """A record's objects as predictions, their masks moved to the right, their scores all unlike.

    Every fourth has the class after its own.
    """
    objects = record["annotations"]
    size = record["height"], record["width"]
    masks = [coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], *size)) for a in objects]
    masks = [coco_mask.encode(np.roll(coco_mask.decode(m), shift, 1).copy("F")) for m in masks]
    wrong = [shift > 0 and index % 4 == 3 for index in range(len(objects))]
    return {
        "image_id": record["image_id"],
        "boxes": [
            [x0 + shift, y0, x1 + shift, y1] for x0, y0, x1, y1 in (a["bbox"] for a in objects)
        ],
        "scores": [0.9 - 0.01 * i - 1e-6 * (record["image_id"] % 997) for i in range(len(objects))],
        "classes": [a["category_id"] + w for a, w in zip(objects, wrong, strict=True)],
        "segmentations": [{**mask, "counts": mask["counts"].decode()} for mask in masks],
    }


def by_hand(monkeypatch, dataset, predictions, task):
    """What the official package says, with the one name that NumPy has lost lent to it."""
    lvis = pytest.importorskip("lvis", reason="the official tool, which brings a second OpenCV")

    results = []
    for found in predictions:
        for index, label in enumerate(found["classes"]):
            x0, y0, x1, y1 = found["boxes"][index]
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if task == "segm":
                shape = {"segmentation": found["segmentations"][index]}
            ids = {"image_id": found["image_id"], "category_id": label + 1}
            results.append({**ids, **copy.deepcopy(shape), "score": found["scores"][index]})
    truth = lvis.LVIS(str(dataset.json_file))
    with monkeypatch.context() as lent:
        lent.setattr(np, "float", float, raising=False)
        run = lvis.LVISEval(truth, lvis.LVISResults(truth, results), task)
        run.run()
    return {metric: 100 * run.results[metric] for metric in METRICS}


def test_equals_the_official_package(photographs, monkeypatch):
    predictions = [as_found(record, shift=4) for record in photographs.records()]
    found = evaluate(photographs, predictions)
    assert set(found) == {"bbox", "segm"}
    for task, metrics in found.items():
        expected = by_hand(monkeypatch, photographs, predictions, task)
        expected = {m: v if v >= 0 else math.nan for m, v in expected.items()}
        assert metrics == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert 20 < metrics["AP"] < 80


def test_the_ground_truth_found_is_100(photographs):
    found = evaluate(photographs, [as_found(record) for record in photographs.records()])
    for metrics in found.values():
        known = {metric: value for metric, value in metrics.items() if not math.isnan(value)}
        assert len(known) >= 7
        assert known == pytest.approx(dict.fromkeys(known, 100))


def test_metrics_recorded_from_detectron2(recorded):
    expected = read("lvis_ap")
    found = evaluate(*recorded)
    for task in ("bbox", "segm"):
        assert found[task] == pytest.approx(expected[task], abs=1e-9)
    assert tuple(found["segm"]) == METRICS


def test_nothing_found_is_zero_and_no_ground_truth_is_nan(recorded):
    dataset, _ = recorded
    empty = [{"image_id": 1, "boxes": [], "scores": [], "classes": [], "segmentations": []}]
    for predictions in ([], empty):
        found = evaluate(dataset, predictions)
        assert set(found["bbox"].values()) == {0}
    content = json.loads(dataset.json_file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 4]  # rare
    dataset.json_file.write_text(json.dumps(content))
    assert math.isnan(evaluate(dataset, empty)["segm"]["APr"])


def test_the_best_300_of_an_image_count(recorded):
    """A right box behind 299 others counts, and behind 300 it does not."""
    dataset, _ = recorded
    first = dataset.records()[0]
    box, label = (first["annotations"][0][key] for key in ("bbox", "category_id"))
    for others, expected in ((299, True), (300, False)):
        elsewhere = [[190, 190, 199, 199]] * others
        prediction = {
            "image_id": first["image_id"],
            "boxes": [*elsewhere, box],
            "scores": [0.9] * others + [0.1],
            "classes": [label] * (others + 1),
        }
        assert (evaluate(dataset, [prediction])["bbox"]["AP"] > 0) == expected


def test_predictions_that_do_not_fit_are_refused(recorded):
    dataset, predictions = recorded
    with pytest.raises(ValueError, match=r"not in the data set: \[99\]"):
        evaluate(dataset, [predictions[0] | {"image_id": 99}])
    smaller = coco_mask.encode(np.zeros((10, 20), np.uint8, order="F"))
    shapes = [smaller] * len(predictions[0]["boxes"])
    with pytest.raises(
        ValueError, match=r"a mask is of size \[10, 20\], the image of \[200, 200\]"
    ):
        evaluate(dataset, [predictions[0] | {"segmentations": shapes}])


def test_nothing_is_printed_or_logged(recorded, capsys, caplog):
    evaluate(*recorded)
    assert capsys.readouterr().out == ""
    assert not caplog.records


def test_a_missing_package_is_named(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match="needs the package faster-coco-eval: pip install faster"):
        evaluate(*recorded)
