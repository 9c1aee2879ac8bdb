"""A finished run's files, written by hand, read back as the report's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import RunFolder
from moco_det.benchmark.report import outcome
from moco_det.benchmark.synthetic import images as procedural_images
from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset


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
    assert outcome.read_pretraining(tmp_path / "metrics.jsonl") == {
        "loss": [[0.5, 6.0], [1.0, 5.0]],
        "chance_loss": 6.9,
        "knn": [[0, 20.0], [1, 31.5]],
    }


@pytest.fixture
def folder(tmp_path):
    experiment = Experiment("quickstart", "", 0, 0, 1)
    return RunFolder(Run(experiment, "moco", 0, Path("c.yaml"), ()), tmp_path)


def test_detector_numbers_are_those_of_the_last_evaluation(folder):
    first = {"iteration": 39, "bbox/AP": 1.0, "bbox/AP50": 2.0, "bbox/AP75": 3.0}
    last = {"iteration": 40, "bbox/AP": 4.0, "bbox/AP50": 5.0, "bbox/AP75": 6.0, "bbox/AP-x": None}
    write_lines(folder.path / "metrics.json", [first, last])
    assert outcome.read_ap(folder) == {"AP": 4.0, "AP50": 5.0, "AP75": 6.0}


def test_a_detector_without_evaluation_is_named(folder):
    write_lines(folder.path / "metrics.json", [{"iteration": 19, "lr": 0.1, "total_loss": 2.5}])
    with pytest.raises(UserError, match="no 'bbox/AP'"):
        outcome.read_ap(folder)


def test_predictions(tmp_path):
    entries = [
        {"image_id": "a", "boxes": [[1, 2, 3, 4]], "scores": [0.5], "classes": [7]},
        {"image_id": "b", "boxes": [], "scores": [], "classes": []},
    ]
    write_lines(tmp_path / "inference/predictions.json", [entries])
    found = outcome.read_predictions(tmp_path)
    np.testing.assert_array_equal(found["a"].boxes, [[1, 2, 3, 4]])
    assert found["a"].classes.tolist() == [7]
    assert found["b"].boxes.shape == (0, 4)
    with pytest.raises(UserError, match="inference"):
        outcome.read_predictions(tmp_path / "elsewhere")


def test_pairs_show_true_boxes_and_both_detectors(tmp_path):
    procedural_images.write_voc_scenes(tmp_path, "test", seed=0, count=2)
    dataset = get_dataset(f"voc:{tmp_path / 'scenes'}:test")
    record = dataset.records()[0]
    boxes = [a["bbox"] for a in record["annotations"]]
    perfect = outcome.gallery.Boxes(
        np.array(boxes, np.float32),
        np.array([a["category_id"] for a in record["annotations"]]),
        np.ones(len(boxes), np.float32),
    )
    nothing = outcome.gallery.Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    found = {"moco": {record["image_id"]: perfect}, "random": {record["image_id"]: nothing}}
    pair = outcome.draw_pair(record, found, dataset.classes)
    total = len(boxes)
    assert pair.moco_words == f"{total} of {total} objects found, 0 false detections"
    assert pair.random_words == f"0 of {total} objects found, 0 false detections"
    assert pair.moco.count('class="right"') == total
    assert pair.random.count('class="truth"') == total
