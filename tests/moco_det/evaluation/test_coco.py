"""COCO's metrics: published and recorded numbers of the official tools, and hand cases."""

import json
import math
import re
from collections import defaultdict

import numpy as np
import pytest
import record_coco_ap
import record_coco_shapes
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from recording import read
from tiny_coco import tiny_coco, write_tiny_coco

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset
from moco_det.evaluation import evaluate
from moco_det.evaluation.coco import load_ground_truth, require_keypoints
from moco_det.evaluation.predictions import prediction_record, save_predictions

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")


def as_predictions(results, category_ids):
    """COCO's result format (XYWH, ids of the file) as predictions (XYXY, contiguous)."""
    rows = defaultdict(lambda: defaultdict(list))
    for result in results:
        x, y, width, height = result.get("bbox", [0, 0, 0, 0])
        row = rows[result["image_id"]]
        row["boxes"].append([x, y, x + width, y + height])
        row["scores"].append(result["score"])
        row["classes"].append(category_ids.index(result["category_id"]))
        if "segmentation" in result:
            row["segmentations"].append(result["segmentation"])
        if "keypoints" in result:
            points = torch.tensor(result["keypoints"], dtype=torch.float64).reshape(-1, 3)
            row["keypoints"].append((points + torch.tensor([0.5, 0.5, 0])).tolist())
    return [{"image_id": image_id, **row} for image_id, row in rows.items()]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_twelve_published_numbers(shared_data, task):
    folder = shared_data("cocoapi_eval")
    published = (folder / "val2014_fake_eval_res.txt").read_text().split("type=")
    (section,) = (part for part in published if part.startswith(task))
    expected = [float(number) for number in re.findall(r"\] = (\d\.\d+)", section)]
    assert len(expected) == 12
    dataset = get_dataset(f"coco:{folder}/instances_val2014_100.json:{folder}")
    results = json.loads((folder / f"instances_val2014_fake{task}100_results.json").read_text())
    found = evaluate(dataset, as_predictions(results, dataset.category_ids))[task]
    assert [round(found[metric] / 100, 3) for metric in METRICS] == expected


def test_keypoints_as_pycocotools_scores_them(shared_data, capsys):
    """128 detections in a photograph of 14 persons, with COCO's own 17 sigmas."""
    folder = shared_data("cocoapi_eval") / "keypoints_fce"
    results = json.loads((folder / "dt_dataset.json").read_text())
    dataset = get_dataset(f"coco:{folder}/gt_dataset.json:{folder}")
    found = evaluate(dataset, as_predictions(results, dataset.category_ids))["keypoints"]
    truth = COCO(str(folder / "gt_dataset.json"))
    run = COCOeval(truth, truth.loadRes(results), "keypoints")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert 10 < found["AP"] < 90
    expected = [100 * value if value >= 0 else math.nan for value in run.stats]
    assert [found[m] for m in KEYPOINT_METRICS] == pytest.approx(expected, abs=1e-9, nan_ok=True)


def recorded_case(folder):
    """The data set and the predictions of `record_coco_shapes`, as a native model gives them."""
    content, detections = record_coco_shapes.draw_case()
    (folder / "a.json").write_text(json.dumps(content))
    predictions = [
        prediction_record(found.pop("image_id"), {k: torch.tensor(v) for k, v in found.items()})
        for found in detections
    ]
    return get_dataset(f"coco:{folder}/a.json:{folder}"), predictions


@pytest.mark.parametrize("task", ["segm", "keypoints"])
def test_masks_and_keypoints_recorded_from_detectron2(tmp_path, task):
    dataset, predictions = recorded_case(tmp_path)
    found = evaluate(dataset, predictions, record_coco_shapes.SIGMAS)[task]
    expected = read("coco_shapes")[task]
    assert len(expected) == {"segm": 6, "keypoints": 5}[task] + len(record_coco_shapes.CATEGORIES)
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-9)


def test_saved_predictions_score_the_same(tmp_path):
    dataset, predictions = recorded_case(tmp_path)
    save_predictions(str(tmp_path), "case", predictions)
    saved = json.loads((tmp_path / "inference" / "case.json").read_text())
    sigmas = record_coco_shapes.SIGMAS
    assert evaluate(dataset, saved, sigmas) == evaluate(dataset, predictions, sigmas)


def test_the_tasks_are_those_of_the_predictions(tmp_path):
    dataset, predictions = recorded_case(tmp_path)
    assert set(evaluate(dataset, [])) == {"bbox"}
    for prediction in predictions:
        del prediction["keypoints"]
    assert set(evaluate(dataset, predictions)) == {"bbox", "segm"}
    del predictions[3]["segmentations"]
    with pytest.raises(ValueError, match="11 of 12 predictions have segmentations"):
        evaluate(dataset, predictions)


def test_small_medium_and_large_are_told_by_the_mask(tmp_path):
    """A mask of 20 x 20 pixels in a box of 100 x 100, found with a false one in another image."""
    mask = np.zeros((200, 200), np.uint8, order="F")
    mask[:20, :20] = 1
    square = {**coco_mask.encode(mask)}
    square["counts"] = square["counts"].decode()
    fields = {"file_name": "x.jpg", "height": 200, "width": 200}
    annotation = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 100], "iscrowd": 0}
    content = {
        "images": [{"id": 1, **fields}, {"id": 2, **fields}],
        "categories": [{"id": 1, "name": "ant"}],
        "annotations": [{"id": 1, "segmentation": square, **annotation}],  # and no "area"
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")
    common = {"boxes": [[0, 0, 100, 100]], "classes": [0], "segmentations": [square]}
    predictions = [
        {"image_id": 2, "scores": [0.9], **common},
        {"image_id": 1, "scores": [0.8], **common},
    ]
    found = evaluate(dataset, predictions)["segm"]
    assert found["APs"] == pytest.approx(50)  # the false one, first in rank, is small, too
    assert math.isnan(found["APl"])


def shapes_file(folder, **changes):
    annotation = {"id": 7, "image_id": 4, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 9}
    content = {
        "images": [{"id": 4, "file_name": "4.jpg", "height": 100, "width": 100}],
        "categories": [{"id": 2, "name": "ant"}],
        "annotations": [annotation | changes],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return get_dataset(f"coco:{folder}/a.json:{folder}")


EMPTY = {"image_id": 4, "boxes": [], "scores": [], "classes": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "annotation 7 of image 4 has no segmentation.*MODEL.MASK_ON False"),
        ({"segmentation": []}, "annotation 7 of image 4 has no segmentation"),
        ({"segmentation": {"size": [100, 100]}}, "annotation 7 .* whose runs do not make up its"),
        ({"segmentation": [[]]}, "annotation 7 of image 4 has no valid polygon"),
    ],
)
def test_ground_truth_without_masks_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        evaluate(shapes_file(tmp_path, **changes), [EMPTY | {"segmentations": []}])


def test_ground_truth_without_keypoints_is_named(tmp_path):
    prediction = EMPTY | {"keypoints": []}
    for keypoints, message in (([], "MODEL.KEYPOINT_ON False"), ([1, 2], "annotation 7 .* 2 numb")):
        with pytest.raises(UserError, match=f"a.json.*{message}"):
            evaluate(shapes_file(tmp_path, keypoints=keypoints), [prediction])
    dataset = shapes_file(tmp_path, keypoints=[1, 2, 2, 3, 4, 0])
    with pytest.raises(UserError, match="2 keypoints .* 17 sigmas: set TEST.KEYPOINT_OKS_SIGMAS"):
        evaluate(dataset, [prediction])
    one = {"image_id": 4, "boxes": [[0, 0, 9, 9]], "scores": [1], "classes": [0]}
    with pytest.raises(UserError, match="3 keypoints were predicted where .* has 2: set MODEL"):
        evaluate(dataset, [one | {"keypoints": [[[0, 0, 1]] * 3]}], (0.1, 0.1))
    found = evaluate(dataset, [one | {"keypoints": [[[1.5, 2.5, 1]] * 2]}], (0.1, 0.1))
    assert found["keypoints"]["AP"] == pytest.approx(100)  # the second one is not labelled


def test_the_same_as_detectron2_on_photographs(shared_data, capsys):
    """coco_mini's persons, found again with noise: boxes, masks and keypoints in one go."""
    evaluation = pytest.importorskip("detectron2.evaluation")
    catalog = pytest.importorskip("detectron2.data").MetadataCatalog
    root = shared_data("coco_mini")
    json_file = root / "annotations" / "person_keypoints_val2017.json"
    dataset = get_dataset(f"coco:{json_file}:{root / 'val2017'}")
    outputs = {r["image_id"]: noisy_output(r) for r in dataset.records() if r["annotations"]}
    catalog.get("persons").set(json_file=str(json_file), thing_classes=["person"])
    catalog.get("persons").thing_dataset_id_to_contiguous_id = {1: 0}
    official = evaluation.COCOEvaluator("persons", distributed=False, use_fast_impl=False)
    catalog.remove("persons")
    official.reset()
    predictions = []
    for image_id, output in outputs.items():
        predictions.append(prediction_record(image_id, output))
        arrays = {name: value.numpy() for name, value in output.items()}
        instances = record_coco_shapes.as_instances(arrays)
        official.process([{"image_id": image_id}], [{"instances": instances}])
    found, expected = evaluate(dataset, predictions), official.evaluate()
    for task in ("bbox", "segm", "keypoints"):
        ours = {metric: found[task][metric] for metric in expected[task]}
        assert 20 < ours["AP"] < 99
        assert ours == pytest.approx(expected[task], abs=1e-6)


def noisy_output(record):
    """A record's objects as a model finds them, not quite."""
    generator = torch.Generator().manual_seed(record["image_id"])
    objects = [a for a in record["annotations"] if not a["iscrowd"] and "keypoints" in a]
    size = (record["height"], record["width"])
    masks = torch.zeros((len(objects), *size), dtype=torch.bool)
    for mask, annotation in zip(masks, objects, strict=True):
        runs = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], *size))
        mask.copy_(torch.from_numpy(coco_mask.decode(runs)).roll(3, 1))
    noise = torch.randn(len(objects), 4, generator=generator)
    points = torch.tensor([a["keypoints"] for a in objects]).reshape(-1, 17, 3)
    return {
        "boxes": (torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4) + 4 * noise).float(),
        "scores": torch.rand(len(objects), generator=generator),
        "classes": torch.zeros(len(objects), dtype=torch.int64),
        "masks": masks,
        "keypoints": (points + 5 * torch.randn(points.shape, generator=generator)).float(),
    }


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


def test_what_a_file_lacks_is_made_up_by_hand(tmp_path):
    """Areas of boxes and of polygons; how many keypoints are labelled, hidden ones included."""
    content = tiny_coco()
    first, second, third, fourth = content["annotations"]
    for annotation in (first, second, third):
        del annotation["area"]
    del first["segmentation"]  # 30 x 40 by its box
    second["segmentation"] = [[60, 20, 100, 20, 60, 80]]  # half of its box of 40 x 60
    second["keypoints"], third["keypoints"] = [1, 1, 1, 2, 2, 1, 0, 0, 0], [0] * 9
    del fourth["keypoints"]
    fourth["area"] = 7.0
    dataset = get_dataset(write_tiny_coco(tmp_path, content))
    loaded = dataset.content()
    require_keypoints(loaded, dataset)
    found = load_ground_truth(dataset, loaded).anns
    assert found[1]["area"] == 30 * 40
    assert found[2]["area"] == pytest.approx(40 * 60 / 2, rel=0.03)  # in whole pixels
    assert (found[3]["area"], found[4]["area"]) == (30 * 40, 7.0)
    assert [found[number]["num_keypoints"] for number in (1, 2, 3, 4)] == [2, 2, 0, 0]
    assert found[4]["keypoints"] == [0] * 9
