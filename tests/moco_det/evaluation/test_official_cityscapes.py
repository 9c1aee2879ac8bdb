"""Cityscapes' metrics against the official script run as a whole, and Detectron2's numbers."""

import math
import sys

import numpy as np
import pytest
import record_cityscapes_ap
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from recording import read

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.datasets.cityscapes import CityscapesDataset
from moco_det.evaluation import evaluate
from moco_det.evaluation.predictions import encode_masks, prediction_record

tool = pytest.importorskip(
    "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
    reason="the official tool, in the extra [cityscapes]",
)


@pytest.fixture
def recorded(tmp_path):
    """The data set and the predictions of `record_cityscapes_ap`."""
    maps, detections = record_cityscapes_ap.draw_case()
    record_cityscapes_ap.write_case(tmp_path, maps)
    predictions = [
        prediction_record(found.pop("image_id"), {k: torch.tensor(v) for k, v in found.items()})
        for found in detections
    ]
    return get_dataset(f"cityscapes:{tmp_path}:val"), predictions


def by_hand(monkeypatch, dataset, predictions, folder):
    """The script's one function for all, on files named as it finds them by itself."""
    labels = dict(zip(record_cityscapes_ap.CLASSES, record_cityscapes_ap.LABELS, strict=True))
    folder.mkdir()
    for found in predictions:
        lines = []
        for index, shape in enumerate(found["segmentations"]):
            name = f"mask_{found['image_id']}_{index}.png"
            Image.fromarray(coco_mask.decode(shape) * np.uint8(255)).save(folder / name)
            label = labels[dataset.classes[int(found["classes"][index])]]
            lines.append(f"{name} {label} {float(found['scores'][index])}\n")
        (folder / f"{found['image_id']}_prediction.txt").write_text("".join(lines))
    truth = [str(path) for _, _, path in dataset.pairs()]
    with monkeypatch.context() as patched:
        patched.setattr(np, "in1d", np.isin, raising=False)  # which NumPy has lost
        patched.setattr(tool, "writeDict2JSON", lambda *_: None)  # cannot write NumPy's integers
        patched.setattr(tool.args, "predictionPath", str(folder))
        patched.setattr(tool.args, "predictionWalk", None)
        patched.setattr(tool.args, "gtInstancesFile", str(folder / "gtInstances.json"))
        patched.setattr(tool.args, "JSONOutput", False)
        lists = [tool.getPrediction(path, tool.args) for path in truth]
        averages = tool.evaluateImgLists(lists, truth, tool.args)["averages"]
    expected = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
    expected |= {f"AP-{name}": averages["classes"][name]["ap"] for name in dataset.classes}
    return {name: 100 * value for name, value in expected.items()}


def test_equals_the_script_as_a_whole(recorded, monkeypatch, tmp_path, capsys):
    dataset, predictions = recorded
    found = evaluate(dataset, predictions)
    assert set(found) == {"segm"}
    expected = by_hand(monkeypatch, dataset, predictions, tmp_path / "by_hand")
    assert found["segm"] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert sum(not math.isnan(value) for value in expected.values()) == 2 + 3


def test_equals_the_script_on_a_real_image(shared_data, monkeypatch, tmp_path):
    """One of Frankfurt, of which there is no photograph here; with masks moved by 2 pixels."""
    source = shared_data("cityscapes_sample") / "gtFine" / "val" / "frankfurt"
    name = "frankfurt_000001_013710"
    numbers = np.array(Image.open(source / f"{name}_gtFine_instanceIds.png"))[300:700, 500:1500]
    record_cityscapes_ap.write_case(tmp_path, {name: numbers})
    dataset = get_dataset(f"cityscapes:{tmp_path}:val")
    predictions = [as_found(record, shift=2) for record in dataset.records()]
    assert len(predictions[0]["scores"]) > 15
    found = evaluate(dataset, predictions)["segm"]
    expected = by_hand(monkeypatch, dataset, predictions, tmp_path / "by_hand")
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 10 < found["AP"] < 90


def as_found(record, shift=0):
    """A record's objects, but for groups, as predictions, their masks moved to the right."""
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    masks = np.array([np.roll(coco_mask.decode(a["segmentation"]), shift, 1) for a in objects])
    return {
        "image_id": record["image_id"],
        "boxes": [a["bbox"] for a in objects],
        "scores": np.linspace(0.9, 0.1, len(objects)),
        "classes": [a["category_id"] for a in objects],
        "segmentations": encode_masks(torch.from_numpy(masks.astype(bool))),
    }


def test_metrics_recorded_from_detectron2(recorded):
    found = evaluate(*recorded)["segm"]
    expected = read("cityscapes_ap")["segm"]
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-9)


def test_the_ground_truth_found_is_100(recorded):
    dataset, _ = recorded
    found = evaluate(dataset, [as_found(record) for record in dataset.records()])["segm"]
    known = {metric: value for metric, value in found.items() if not math.isnan(value)}
    assert known == dict.fromkeys(("AP", "AP50", "AP-person", "AP-car", "AP-bicycle"), 100)


def test_a_mask_over_a_group_counts_neither_way(tmp_path):
    """By hand: the car is found; a second mask is on the group, a third on the road.

    With the third, first in rank, precision is 0 at recall 0 and 1/2 at recall 1; the script gives
    half of the step between them to each.
    """
    numbers = np.full((100, 300), 7, dtype=np.uint16)
    numbers[:, :50], numbers[:, 100:150] = 26001, 26
    record_cityscapes_ap.write_case(tmp_path, {"aachen_000000_000019": numbers})
    dataset = get_dataset(f"cityscapes:{tmp_path}:val")
    masks = torch.zeros(3, 100, 300, dtype=torch.bool)
    for mask, start in zip(masks, (0, 100, 200), strict=True):
        mask[:, start : start + 50] = True
    for kept, expected in (([0, 1], 100), ([0, 1, 2], 25)):
        output = {
            "boxes": torch.zeros(len(kept), 4),
            "scores": torch.tensor([0.7, 0.8, 0.9])[kept],
            "classes": torch.full((len(kept),), 2),
            "masks": masks[kept],
        }
        found = evaluate(dataset, [prediction_record("aachen_000000_000019", output)])["segm"]
        assert (found["AP"], found["AP-car"]) == pytest.approx((expected, expected))
        assert math.isnan(found["AP-bus"])


def test_nothing_found_is_zero(recorded):
    dataset, predictions = recorded
    for found in ([], [predictions[0] | dict.fromkeys(("boxes", "scores", "classes"), [])]):
        for prediction in found:
            prediction["segmentations"] = []
        results = evaluate(dataset, found)["segm"]
        assert (results["AP"], results["AP50"], results["AP-car"]) == (0, 0, 0)


def test_what_does_not_fit_is_refused(recorded):
    dataset, predictions = recorded
    with pytest.raises(ValueError, match="not in the data set: .'elsewhere'"):
        evaluate(dataset, [predictions[0] | {"image_id": "elsewhere"}])
    shapes = [{"size": [200, 201], "counts": "0" * 5}] * len(predictions[0]["scores"])
    with pytest.raises(ValueError, match="the runs of a mask do not make up its size"):
        evaluate(dataset, [predictions[0] | {"segmentations": shapes}])
    del predictions[0]["segmentations"]
    with pytest.raises(UserError, match="Cityscapes scores masks.*MODEL.MASK_ON True"):
        evaluate(dataset, predictions)


def test_nothing_is_printed_left_or_changed(recorded, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "gtFine")
    before, files = dict(vars(tool.args)), sorted(tmp_path.rglob("*"))
    evaluate(*recorded)
    assert capsys.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == files
    assert {key: id(value) for key, value in vars(tool.args).items()} == {
        key: id(value) for key, value in before.items()
    }
    assert tool.np is np
    assert not hasattr(np, "in1d")


def test_a_changed_ground_truth_is_seen(recorded):
    """The script by itself would go on with the ground truth of its first call."""
    dataset, predictions = recorded
    before = evaluate(dataset, predictions)["segm"]["AP-car"]
    for _, _, path in dataset.pairs():
        numbers = np.array(Image.open(path))
        Image.fromarray(np.where(numbers // 1000 == 26, 7, numbers).astype(np.uint16)).save(path)
    after = evaluate(dataset, predictions)["segm"]["AP-car"]
    assert before > 0
    assert math.isnan(after)


def test_a_missing_package_is_named(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, tool.__name__, None)
    with pytest.raises(UserError, match="pip install cityscapesscripts"):
        evaluate(*recorded)


def test_photographs_are_not_looked_at(recorded):
    dataset, predictions = recorded
    assert isinstance(dataset, CityscapesDataset)
    assert all(p.stat().st_size == 0 for p in dataset.image_dir.rglob("*.png"))
    assert evaluate(dataset, predictions)["segm"]["AP"] > 0


def test_a_class_whose_predictions_all_lie_on_void_has_ap_0(tmp_path):
    """The script takes the last of an empty list there; a class without predictions it gives 0."""
    numbers = np.full((100, 300), 7, dtype=np.uint16)
    numbers[:, :50], numbers[:, 100:150], numbers[:, 150:] = 26001, 24001, 0
    record_cityscapes_ap.write_case(tmp_path, {"aachen_000000_000019": numbers})
    dataset = get_dataset(f"cityscapes:{tmp_path}:val")
    masks = torch.zeros(2, 100, 300, dtype=torch.bool)
    masks[0, :, :50], masks[1, :, 200:280] = True, True  # the car, and a person on void
    output = {
        "boxes": torch.zeros(2, 4),
        "scores": torch.tensor([0.7, 0.8]),
        "classes": torch.tensor([2, 0]),
        "masks": masks,
    }
    found = evaluate(dataset, [prediction_record("aachen_000000_000019", output)])["segm"]
    assert (found["AP-person"], found["AP-car"], found["AP"]) == pytest.approx((0, 100, 50))
