"""DensePose's annotations: hand-written files, broken ones, and Detectron2's reader."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset

POINTS = {
    "dp_x": [12.5, 255.0],
    "dp_y": [0.0, 100.0],
    "dp_I": [1.0, 24.0],
    "dp_U": [0.25, 1.0],
    "dp_V": [0.0, 0.5],
}
LEFT_HALF = np.zeros((256, 256), np.uint8, order="F")
LEFT_HALF[:, :128] = 1


def packed(mask):
    shape = coco_mask.encode(np.asfortranarray(mask))
    return {**shape, "counts": shape["counts"].decode()}


MASKS = [packed(LEFT_HALF), *[[]] * 13]


def write(path, **fields):
    """Two persons, the first of whom has dense pose and `fields`."""
    person = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0}
    posed = {"id": 1, **person, **POINTS, "dp_masks": MASKS, "keypoints": [1, 2, 2], **fields}
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 40, "width": 50}],
        "categories": [{"id": 1, "name": "person", "keypoints": ["nose"]}],
        "annotations": [posed, {"id": 2, **person, "segmentation": [[1, 2, 11, 2, 11, 22]]}],
    }
    path.write_text(json.dumps(content))
    return path


def open_own(tmp_path, **fields):
    return get_dataset(f"densepose:{write(tmp_path / 'a.json', **fields)}:{tmp_path}")


def test_records(tmp_path):
    dataset = open_own(tmp_path)
    assert (dataset.evaluator, dataset.classes) == ("densepose", ("person",))
    assert dataset.keypoint_names == ("nose",)
    (record,) = dataset.records()
    posed, other = record["annotations"]
    assert posed == {
        "bbox": [1, 2, 11, 22],
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": [1.5, 2.5, 2],
        **POINTS,
        "dp_masks": MASKS,
    }
    assert not any(key.startswith("dp_") for key in other)
    assert other["segmentation"] == [[1, 2, 11, 2, 11, 22]]


def test_masks_may_lack_and_be_uncompressed(tmp_path):
    runs = {"size": [256, 256], "counts": [0, 128 * 256, 128 * 256]}
    (record,) = open_own(tmp_path, dp_masks=[*[[]] * 13, runs]).records()
    masks = record["annotations"][0]["dp_masks"]
    np.testing.assert_array_equal(coco_mask.decode(masks[13]), LEFT_HALF)
    (record,) = open_own(tmp_path, dp_masks=[]).records()
    assert "dp_masks" not in record["annotations"][0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dp_x": [1.0]},
            "annotation 1 of image 7 has 1 dp_x, 2 dp_y, .* to be of one length",
        ),
        ({"dp_I": [1, 25]}, "has 25 in dp_I, which goes from 0 to 24"),
        ({"dp_I": [1, -1]}, "has -1 in dp_I"),
        ({"dp_I": [1, 1.5]}, "not whole numbers"),
        ({"dp_U": [0, 1.1]}, "has 1.1 in dp_U, which goes from 0 to 1"),
        ({"dp_V": [0, float("nan")]}, "has nan in dp_V"),
        ({"dp_y": [0, 257]}, "has 257 in dp_y, which goes from 0 to 256"),
        ({"dp_V": ["a", "b"]}, "malformed annotation"),
        ({"dp_masks": MASKS[:13]}, "has 13 masks in dp_masks, which holds 14"),
        ({"dp_masks": MASKS[0]}, "has no list of masks in dp_masks"),
        ({"dp_masks": [[[1, 2, 3, 4]], *MASKS[1:]]}, "not an RLE: it needs size and counts"),
        (
            {"dp_masks": [{**MASKS[0], "size": [128, 128]}, *MASKS[1:]]},
            r"of size \[128, 128\] in dp_masks, not of \[256, 256\]",
        ),
    ],
)
def test_broken_annotations_are_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=rf"a\.json.*{message}"):
        open_own(tmp_path, **fields).records()


def test_lists_that_are_absent_are_named(tmp_path):
    path = write(tmp_path / "a.json")
    content = json.loads(path.read_text())
    del content["annotations"][0]["dp_U"], content["annotations"][0]["dp_I"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of image 7 has dp_x, dp_y, dp_V and lacks dp_I, dp_U"):
        get_dataset(f"densepose:{path}:{tmp_path}").records()


@pytest.mark.parametrize(
    ("name", "json_name", "folder"),
    [
        ("densepose_coco_2014_train", "densepose_train2014.json", "train2014"),
        ("densepose_coco_2014_minival", "densepose_minival2014.json", "val2014"),
        ("densepose_coco_2014_minival_100", "densepose_minival2014_100.json", "val2014"),
        ("densepose_coco_2014_valminusminival", "densepose_valminusminival2014.json", "val2014"),
    ],
)
def test_built_in_names(tmp_path, monkeypatch, name, json_name, folder):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError, match=rf"{json_name}, which does not exist"):
        get_dataset(name)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    write(tmp_path / "coco" / "annotations" / json_name)
    (tmp_path / "coco" / folder).mkdir()
    (record,) = get_dataset(name).records()
    assert record["file_name"] == str(tmp_path / "coco" / folder / "7.jpg")


def test_records_are_those_of_detectron2(tmp_path):
    reader = pytest.importorskip(
        "densepose.data.datasets.coco", reason="Detectron2's DensePose", exc_type=ImportError
    )
    dataset = open_own(tmp_path)
    expected = reader.load_coco_json(str(dataset.json_file), str(tmp_path), "ours")
    for ours, theirs in zip(dataset.records(), expected, strict=True):
        assert ours["file_name"] == theirs["file_name"]
        for own, other in zip(ours["annotations"], theirs["annotations"], strict=True):
            x, y, width, height = other.pop("bbox")
            assert own.pop("bbox") == [x, y, x + width, y + height]
            del other["bbox_mode"], own["category_id"], other["category_id"]
            assert own == other
