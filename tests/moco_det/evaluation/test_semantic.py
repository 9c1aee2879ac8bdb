"""mIoU and its kin: hand values, sets of pixels, Detectron2's numbers, Cityscapes' own script."""

import copy
import math

import numpy as np
import pytest
import record_semantic
import torch
from PIL import Image
from recording import read

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset, read_labels
from moco_det.datasets.semantic import CITYSCAPES_LABEL_IDS, SemanticVocDataset
from moco_det.evaluation import evaluate, print_table
from moco_det.evaluation.predictions import prediction_record
from moco_det.evaluation.semantic import confusion_matrix, semantic_metrics

CLASSES = tuple(f"c{i}" for i in range(record_semantic.CLASSES))


def record_of(image_id, labels, count):
    """A label map as the model's scores, and so as a prediction."""
    scores = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), count)
    return prediction_record(image_id, {"sem_seg": scores.permute(2, 0, 1)})


def write_set(root, maps):
    """A data set of four classes with these label maps; its photographs are black."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for index, labels in enumerate(maps):
        Image.fromarray(labels).save(root / f"SegmentationClass/{index}.png")
        Image.new("RGB", labels.shape[::-1]).save(root / f"JPEGImages/{index}.jpg")
    names = "\n".join(str(index) for index in range(len(maps)))
    (root / "ImageSets/Segmentation/all.txt").write_text(names)
    return SemanticVocDataset("drawn", CLASSES, root, "all")


@pytest.fixture
def drawn(tmp_path):
    """The recorder's label maps: a data set, and the predictions."""
    pairs = record_semantic.evaluated_maps()
    dataset = write_set(tmp_path / "set", [true for _, true in pairs])
    found = [record_of(str(i), x, len(CLASSES)) for i, (x, _) in enumerate(pairs)]
    return dataset, found, pairs


def assert_same_metrics(found, expected):
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        value = math.nan if value is None else value
        assert found[name] == pytest.approx(value, nan_ok=True), name


def test_by_hand(tmp_path):
    """Eight pixels: class 0 right on 2 of 3, class 1 on 1 of 2; 2 of 3 is found, never true."""
    true = np.array([[0, 0, 0, 1], [1, 255, 255, 255]], np.uint8)
    found = np.array([[0, 0, 2, 1], [0, 3, 0, 1]], np.uint8)
    dataset = write_set(tmp_path / "set", [true])
    results = evaluate(dataset, [record_of("0", found, 4)])["sem_seg"]
    # What lies on ignored pixels counts nowhere. IoU: 2 / (3 + 1), 1 / 2.
    expected = {
        "mIoU": 50.0,
        "fwIoU": 50.0,
        "mACC": 100 * (2 / 3 + 1 / 2) / 2,
        "pACC": 100 * 3 / 5,
        "IoU-c0": 50.0,
        "IoU-c1": 50.0,
        "IoU-c2": None,
        "IoU-c3": None,
        "ACC-c0": 100 * 2 / 3,
        "ACC-c1": 50.0,
        "ACC-c2": None,
        "ACC-c3": None,
    }
    assert list(results) == list(expected)
    assert_same_metrics(results, expected)


def slow_metrics(pairs, classes):
    """From sets of pixels."""
    found, true = ([{} for _ in classes] for _ in range(2))
    for image, (mine, theirs) in enumerate(pairs):
        for place in np.argwhere(theirs != 255).tolist():
            place = (image, *place)
            found[mine[place[1:]]][place] = true[theirs[place[1:]]][place] = None
    found, true = ([set(x) for x in side] for side in (found, true))
    known = [k for k in range(len(classes)) if true[k]]
    iou = {k: 100 * len(found[k] & true[k]) / len(found[k] | true[k]) for k in known}
    acc = {k: 100 * len(found[k] & true[k]) / len(true[k]) for k in known}
    total = sum(len(x) for x in true)
    return {
        "mIoU": sum(iou.values()) / len(iou),
        "mACC": sum(acc.values()) / len(acc),
        "fwIoU": sum(iou[k] * len(true[k]) for k in known) / total,
        "pACC": sum(acc[k] * len(true[k]) for k in known) / total,
        **{f"IoU-{name}": iou.get(k) for k, name in enumerate(classes)},
        **{f"ACC-{name}": acc.get(k) for k, name in enumerate(classes)},
    }


def test_a_slow_reference(drawn):
    dataset, predictions, pairs = drawn
    results = evaluate(dataset, predictions[::-1])["sem_seg"]
    assert_same_metrics(results, slow_metrics(pairs, CLASSES))
    assert 50 < results["mIoU"] < 90


def test_numbers_recorded_from_detectron2(drawn):
    dataset, predictions, _ = drawn
    expected = read("semantic")["metrics"]
    assert math.isnan(evaluate(dataset, predictions)["sem_seg"]["IoU-c3"])
    assert expected["IoU-c3"] is None
    assert_same_metrics(evaluate(dataset, predictions)["sem_seg"], expected)


def test_detectron2_live(drawn):
    pytest.importorskip("detectron2", reason="compares with Detectron2, which is not installed")
    _, _, pairs = drawn
    for chosen in (pairs, pairs[:1], pairs[1:]):
        confusion = sum(confusion_matrix(*pair, len(CLASSES)) for pair in chosen)
        assert_same_metrics(semantic_metrics(confusion, CLASSES), record_semantic.metrics(chosen))


def test_without_any_labelled_pixel(tmp_path):
    dataset = write_set(tmp_path / "set", [np.full((3, 4), 255, np.uint8)])
    results = evaluate(dataset, [record_of("0", np.zeros((3, 4), np.uint8), 4)])["sem_seg"]
    assert all(math.isnan(value) for value in results.values())


def test_what_is_not_predicted_is_wrong(drawn):
    """An image left out, or a class of it, counts against the classes of its pixels."""
    dataset, predictions, pairs = drawn
    perfect = [record_of(str(i), np.where(t == 255, 0, t), 4) for i, (_, t) in enumerate(pairs)]
    assert evaluate(dataset, perfect)["sem_seg"]["mIoU"] == 100
    without_first = evaluate(dataset, perfect[1:])["sem_seg"]
    labelled = [np.count_nonzero(true != 255) for _, true in pairs]
    assert without_first["pACC"] == pytest.approx(100 * sum(labelled[1:]) / sum(labelled))
    partial = copy.deepcopy(perfect)
    for found in partial:
        found["sem_seg"] = [x for x in found["sem_seg"] if x["category_id"] != 1]
    results = evaluate(dataset, partial)["sem_seg"]
    assert results["ACC-c1"] == results["IoU-c1"] == 0
    assert results["IoU-c0"] == results["IoU-c2"] == 100
    assert evaluate(dataset, [])["sem_seg"]["mIoU"] == 0


def broken(kind):
    first, second = (record_of(i, np.zeros((9, 11), np.uint8), 4) for i in ("0", "1"))
    (segment,) = first["sem_seg"]
    return {
        "twice": [first, first],
        "unknown image": [{**first, "image_id": "none"}],
        "class": [{**first, "sem_seg": [{**segment, "category_id": 4}]}],
        "size": [second],
        "overlap": [{**first, "sem_seg": [segment, {**segment, "category_id": 2}]}],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("twice", "2 predictions for 1 images"),
        ("unknown image", r"not in the data set: \['none'\]"),
        ("class", r"image 0: category 4 is outside \[0, 4\)"),
        ("size", r"image 1: a mask is of size \[9, 11\], the image of \[7, 5\]"),
        ("overlap", "image 0: the mask of category 2 overlaps another"),
    ],
)
def test_predictions_that_do_not_fit(drawn, kind, message):
    with pytest.raises(ValueError, match=message):
        evaluate(drawn[0], broken(kind))


def test_labels_that_are_no_class(tmp_path):
    dataset = write_set(tmp_path / "set", [np.full((3, 4), 4, np.uint8)])
    with pytest.raises(UserError, match="holds the label 4, but there are 4 classes"):
        evaluate(dataset, [])


def test_the_table_shows_each_class(drawn, capsys):
    dataset, predictions, _ = drawn
    print_table(evaluate(dataset, predictions))
    printed = capsys.readouterr().out
    assert "Results for sem_seg:" in printed
    assert "copypaste: mIoU,fwIoU,mACC,pACC" in printed
    assert "c2" in printed


def test_cityscapes_script_agrees(shared_data, tmp_path, monkeypatch):
    """The official pixel-level evaluation, on label maps that are half right."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    root = shared_data("cityscapes_sample")
    dataset = get_dataset(f"cityscapes_sem_seg:{root}:train")
    label_ids = np.array(list(CITYSCAPES_LABEL_IDS), np.uint8)
    random = np.random.RandomState(0)
    predictions, files = [], []
    # Only classes that occur: one that is found but never true is IoU 0 there, and NaN here.
    true = [read_labels(record, 19) for record in dataset.records()]
    present = np.setdiff1d(np.unique(true), [255])
    for record, labels in zip(dataset.records(), true, strict=True):
        wrong = present[random.randint(0, len(present), (64, 128))].repeat(16, 0).repeat(16, 1)
        keep = (random.rand(64, 128) < 0.5).repeat(16, 0).repeat(16, 1) & (labels != 255)
        found = np.where(keep, labels, wrong).astype(np.uint8)
        predictions.append(record_of(record["image_id"], found, 19))
        files.append(str(tmp_path / f"{record['image_id']}.png"))
        Image.fromarray(label_ids[found]).save(files[-1])
    args = copy.copy(script.args)
    args.evalInstLevelScore, args.quiet, args.JSONOutput = False, True, False
    truth = [record["sem_seg_file_name"] for record in dataset.records()]
    official = script.evaluateImgLists(files, truth, args)
    results = evaluate(dataset, predictions)["sem_seg"]
    assert results["mIoU"] == pytest.approx(100 * official["averageScoreClasses"])
    for name in dataset.classes:
        expected = 100 * official["classScores"][name]
        assert results[f"IoU-{name}"] == pytest.approx(expected, nan_ok=True), name
    assert len(present) > 10
