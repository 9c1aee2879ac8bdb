"""What a prediction must be made of, and how it is recorded and saved."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.densepose.points import decode_iuv, encode_iuv
from moco_det.evaluation.predictions import (
    check_images,
    check_masks,
    checked,
    encode_masks,
    prediction_record,
    predictions_file,
    read_predictions,
    save_predictions,
    tasks_of,
)


def detections(**changes):
    return {"image_id": 3, "boxes": [[0, 0, 2, 2]], "scores": [0.5], "classes": [1]} | changes


def runs(mask):
    return encode_masks(torch.as_tensor(mask)[None])[0]


RING = np.ones((4, 5), dtype=bool)
RING[1:3, 1:4] = False


def test_checked_gives_tensors():
    shape = runs(RING)
    found = checked(detections(keypoints=[[[1, 2, 3]]], segmentations=[shape]), 2)
    assert (
        found["boxes"].dtype == found["scores"].dtype == found["keypoints"].dtype == torch.float64
    )
    assert found["classes"].dtype == torch.int64
    assert found["keypoints"].shape == (1, 1, 3)
    assert found["segmentations"] == [shape]
    empty = checked(detections(boxes=[], scores=[], classes=[], keypoints=[], segmentations=[]), 2)
    assert empty["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5, 0.4]}, "image 3: 1 boxes, 2 scores, 1 classes"),
        ({"segmentations": []}, "1 classes, 0 segmentations"),
        ({"classes": [2]}, r"a class is outside \[0, 2\)"),
        ({"keypoints": [[1, 2, 3]]}, r"keypoints of shape \(1, 3\), not NxKx3"),
        ({"keypoints": [[[1, 2]]]}, r"keypoints of shape \(1, 1, 2\), not NxKx3"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        checked(detections(**changes), 2)


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "04",
        runs(RING)["counts"][:-1],
        runs(RING)["counts"] + "1",
        "z",
        "\x7f",
        "é",
        "o" * 20,
        7,
    ],
)
def test_runs_that_do_not_make_up_the_mask_are_refused(counts):
    """pycocotools takes most of them, and returns memory that nobody wrote."""
    with pytest.raises(ValueError, match="image 3: the runs of a mask do not make up its size"):
        checked(detections(segmentations=[{"size": [4, 5], "counts": counts}]), 2)


def test_all_sorts_of_masks_pass():
    random = np.random.RandomState(0)
    for _ in range(200):
        mask = np.zeros(random.randint(1, 60, 2), dtype=bool)
        y, x, h, w = random.randint(0, 40, 4)
        mask[y : y + h, x : x + w] = True
        mask ^= random.rand(*mask.shape) < random.choice([0, 0.01, 0.5])
        checked(detections(segmentations=[runs(mask)]), 2)
    huge = np.zeros((1024, 2048), dtype=bool)
    huge[3:, 1000:] = True
    checked(detections(segmentations=[runs(huge)]), 2)
    as_bytes = coco_mask.encode(np.asfortranarray(huge, dtype=np.uint8))
    checked(detections(segmentations=[as_bytes]), 2)


def test_tasks():
    assert tasks_of([]) == tasks_of([detections()]) == ("bbox",)
    assert tasks_of([detections(keypoints=[], segmentations=[])]) == ("bbox", "segm", "keypoints")
    with pytest.raises(ValueError, match="1 of 2 predictions have keypoints"):
        tasks_of([detections(keypoints=[]), detections()])


def test_images_and_sizes():
    check_images([detections()], {3, 4})
    with pytest.raises(ValueError, match=r"not in the data set: \[3\]"):
        check_images([detections()], {"3", 4})
    found = [detections(segmentations=[runs(RING)])]
    check_masks(found, {3: (4, 5)})
    with pytest.raises(
        ValueError, match=r"image 3: a mask is of size \[4, 5\], the image of \[5, 4\]"
    ):
        check_masks(found, {3: (5, 4)})


def test_record_of_detections(tmp_path):
    output = {
        "boxes": torch.tensor([[0.0, 1, 2, 3]]),
        "scores": torch.tensor([0.5]),
        "classes": torch.tensor([7]),
        "masks": torch.from_numpy(RING)[None],
        "keypoints": torch.tensor([[[1.5, 2.5, 0.1]]]),
    }
    record = prediction_record("a", output)
    output["keypoints"] -= 0.5  # as Detectron2's evaluator does
    assert record["keypoints"].tolist() == [[[1.5, 2.5, pytest.approx(0.1)]]]
    (shape,) = record["segmentations"]
    np.testing.assert_array_equal(coco_mask.decode(shape), RING)
    save_predictions(str(tmp_path), "set", [record])
    (saved,) = json.loads((tmp_path / "inference" / "set.json").read_text())
    assert (saved["image_id"], saved["classes"], saved["segmentations"]) == ("a", [7], [shape])
    assert set(prediction_record("a", {k: output[k] for k in ("boxes", "scores", "classes")})) == {
        *("image_id", "boxes", "scores", "classes")
    }


def test_record_of_dense_pose(tmp_path):
    surfaces = [
        torch.randint(0, 25, (3, height, width), dtype=torch.uint8)
        for height, width in ((4, 3), (1, 7))
    ]
    output = {
        "boxes": torch.tensor([[0.0, 1, 3.5, 5], [0, 0, 7, 0.5]]),
        "scores": torch.tensor([0.5, 0.4]),
        "classes": torch.tensor([0, 0]),
        "densepose": surfaces,
    }
    save_predictions(str(tmp_path), "set", [prediction_record("a", output)])
    (saved,) = json.loads((tmp_path / "inference" / "set.json").read_text())
    for packed, surface in zip(checked(saved, 1)["densepose"], surfaces, strict=True):
        np.testing.assert_array_equal(decode_iuv(packed), surface)


@pytest.mark.parametrize(
    ("box", "fits"),
    [
        ([0, 0, 4, 3], True),
        ([0.5, 0.5, 5.4, 4.4], True),
        ([0, 0, 3.9999999, 3], True),  # as if found in single precision
        ([0, 0, 3.9, 3], False),
        ([0, 0, 5.1, 3], False),
        ([0, 0, 3, 4], False),
    ],
)
def test_a_dense_pose_is_of_the_size_of_its_box(box, fits):
    surface = encode_iuv(np.zeros((3, 3, 4), np.uint8))
    if fits:
        checked(detections(boxes=[box], densepose=[surface]), 2)
        return
    with pytest.raises(ValueError, match=r"image 3: a dense pose of uv_shape \[3, 3, 4\] is not"):
        checked(detections(boxes=[box], densepose=[surface]), 2)


def test_a_dense_pose_without_a_size_is_refused():
    with pytest.raises(ValueError, match="uv_shape None"):
        checked(detections(densepose=[{"uv_data": ""}]), 2)


def test_record_of_a_label_map():
    """Three classes, of which the second is nowhere the best."""
    scores = torch.zeros(3, 4, 5)
    scores[0] = torch.from_numpy(RING) * 2.0
    scores[1], scores[2] = 0.5, 1.0
    record = prediction_record(9, {"sem_seg": scores})
    assert [segment["category_id"] for segment in record["sem_seg"]] == [0, 2]
    first, second = (coco_mask.decode(s["segmentation"]) for s in record["sem_seg"])
    np.testing.assert_array_equal(first, RING)
    np.testing.assert_array_equal(second, ~RING)


def test_predictions_are_read_by_image(tmp_path):
    dataset = SimpleNamespace(name="toy", evaluator="coco", classes=range(8))
    entries = [
        {"image_id": "a", "boxes": [[1, 2, 3, 4]], "scores": [0.5], "classes": [7]},
        {"image_id": 12, "boxes": [], "scores": [], "classes": []},
    ]
    save_predictions(str(tmp_path), "toy", entries)
    found = read_predictions(predictions_file(tmp_path, "toy"), dataset)
    assert found["a"]["boxes"].tolist() == [[1, 2, 3, 4]]
    assert found["a"]["classes"].tolist() == [7]
    assert found["12"]["boxes"].shape == (0, 4)
    with pytest.raises(UserError, match="cannot read predictions .*inference/toy.json"):
        read_predictions(predictions_file(tmp_path / "elsewhere", "toy"), dataset)


@pytest.mark.parametrize(
    ("evaluator", "message"), [("coco", "predicted objects"), ("sem_seg", "predicted label maps")]
)
def test_a_file_of_something_else_is_named(tmp_path, evaluator, message):
    dataset = SimpleNamespace(name="toy", evaluator=evaluator, classes=range(8))
    path = tmp_path / "a.json"
    path.write_text('[{"image_id": 3}]')
    with pytest.raises(UserError, match=f"{path} does not hold {message} for toy"):
        read_predictions(path, dataset)


WHOLE = {"image_id": "a", "boxes": [[1, 2, 3, 4]], "scores": [0.5], "classes": [7]}


@pytest.mark.parametrize(
    "change",
    [
        {"boxes": [[1, 2, 3]]}, {"boxes": [[1, 2, 3, "x"]]}, {"boxes": None}, {"boxes": {"x": 1}},
        {"scores": []}, {"scores": [float("nan")]}, {"boxes": [[1, 2, 3, float("inf")]]},
        {"classes": [8]}, {"classes": [10**30]}, {"classes": "x"}, {"keypoints": [[[1, 2]]]},
        {"segmentations": [5]}, {"segmentations": 5}, {"densepose": [5]},
        {"boxes": [[1, 2, 3, -0.5]]}, {"boxes": [[1, 2, 3, 1e308]]},
    ],
)  # fmt: skip
def test_damaged_predictions_are_one_line(tmp_path, change):
    dataset = SimpleNamespace(name="toy", evaluator="coco", classes=range(8))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([WHOLE | change]))
    with pytest.raises(UserError, match="a.json") as refused:
        read_predictions(path, dataset)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 300


SEGMENT = {"category_id": 7, "segmentation": runs(RING)}


@pytest.mark.parametrize(
    "change",
    [
        {"category_id": 8}, {"category_id": -1}, {"category_id": 1.0}, {"category_id": None},
        {"segmentation": None}, {"segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"segmentation": runs(RING) | {"size": [10**9, 10**9]}},
        {"segmentation": runs(RING) | {"size": [4.0, 5.0]}},
        {"segmentation": runs(RING) | {"size": ["4", "5"]}},
        {"segmentation": runs(RING) | {"counts": [0, 20]}},
        {"segmentation": runs(RING) | {"counts": "~~"}},
    ],
)  # fmt: skip
def test_damaged_label_maps_are_one_line(tmp_path, change):
    dataset = SimpleNamespace(name="toy", evaluator="sem_seg", classes=range(8))
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image_id": "a", "sem_seg": [SEGMENT]}]))
    assert read_predictions(path, dataset) == {"a": {"sem_seg": [SEGMENT]}}
    path.write_text(json.dumps([{"image_id": "a", "sem_seg": [SEGMENT | change]}]))
    with pytest.raises(UserError, match="a.json") as refused:
        read_predictions(path, dataset)
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 300


@pytest.mark.parametrize("text", ["", "\0" * 50, "{", "3", "[3]", "[null]", "[[]]", "[" * 5000])
@pytest.mark.parametrize("evaluator", ["coco", "sem_seg"])
def test_a_file_that_is_none_of_predictions(tmp_path, evaluator, text):
    dataset = SimpleNamespace(name="toy", evaluator=evaluator, classes=range(8))
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match="a.json"):
        read_predictions(path, dataset)
