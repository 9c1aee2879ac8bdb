"""COCO's format against hand-written files, and against Detectron2's loader on real ones."""

import json

import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset


def write_coco(root, **changes):
    """Two images, three categories with gaps in their ids, one crowd; the data set's name."""
    content = {
        "images": [
            {"id": 9, "file_name": "nine.jpg", "height": 40, "width": 50},
            {"id": 2, "file_name": "two.jpg", "height": 40, "width": 50},
        ],
        "categories": [
            {"id": 7, "name": "cat"},
            {"id": 3, "name": "dog"},
            {"id": 90, "name": "emu"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 90, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        ],
    }
    content.update(changes)
    content = {key: value for key, value in content.items() if value is not None}
    (root / "images").mkdir(exist_ok=True)
    (root / "a.json").write_text(json.dumps(content))
    return f"coco:{root}/a.json:{root}/images"


def test_builtin_coco_below_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_coco(tmp_path)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "val2017").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "coco/annotations/instances_val2017.json")
    dataset = get_dataset("coco_2017_val")
    assert dataset.evaluator == "coco"
    assert dataset.records()[0]["file_name"] == str(tmp_path / "coco/val2017/two.jpg")
    assert dataset.keypoint_names == dataset.keypoint_flips == ()
    with pytest.raises(UserError, match="expected .*annotations/person_keypoints_val2017.json"):
        get_dataset("keypoints_coco_2017_val")


def test_coco_records(tmp_path):
    dataset = get_dataset(write_coco(tmp_path))
    assert dataset.classes == ("dog", "cat", "emu")
    assert dataset.category_ids == (3, 7, 90)
    two, nine = dataset.records()
    assert (two["image_id"], two["annotations"]) == (2, [])
    assert nine == {
        "file_name": str(tmp_path / "images" / "nine.jpg"),
        "image_id": 9,
        "height": 40,
        "width": 50,
        "annotations": [
            {"bbox": [1, 2, 11, 22], "category_id": 1, "iscrowd": 0},
            {"bbox": [0, 0, 5, 5], "category_id": 2, "iscrowd": 1},
        ],
    }


def test_coco_leaves_out_what_has_no_shape(tmp_path):
    box = {"image_id": 9, "category_id": 7, "bbox": [1, 2, 10, 20]}
    annotations = [
        {**box, "id": 1, "bbox": [1, 2, 0, 20]},
        {**box, "id": 2, "segmentation": [[1, 2, 3, 4]]},
        {**box, "id": 3, "segmentation": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]},
        {**box, "id": 4, "segmentation": {"size": [40, 50], "counts": [2000]}},
        {**box, "id": 5},
    ]
    _, nine = get_dataset(write_coco(tmp_path, annotations=annotations)).records()
    assert len(nine["annotations"]) == 3


def test_coco_shapes(tmp_path):
    """Polygons without three points go, runs are compressed, keypoints move to pixel centres."""
    box = {"image_id": 9, "category_id": 7, "bbox": [1, 2, 10, 20]}
    annotations = [
        {
            **box,
            "id": 1,
            "segmentation": [[1, 2, 3, 4], [1, 2, 3.5, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]],
        },
        {**box, "id": 2, "segmentation": {"size": [40, 50], "counts": [1, 4, 1995]}},
        {**box, "id": 3, "segmentation": [], "keypoints": []},
        {**box, "id": 4, "keypoints": [3, 4, 2, 0, 0, 0]},
    ]
    _, nine = get_dataset(write_coco(tmp_path, annotations=annotations)).records()
    polygons, runs, neither, keypoints = nine["annotations"]
    assert polygons["segmentation"] == [[1, 2, 3.5, 4, 5, 6]]
    decoded = coco_mask.decode(runs["segmentation"])
    assert decoded.shape == (40, 50)
    assert decoded.ravel(order="F").tolist() == [0, *[1] * 4, *[0] * 1995]
    assert isinstance(runs["segmentation"]["counts"], bytes)
    assert set(neither) == {"bbox", "category_id", "iscrowd"}
    assert keypoints["keypoints"] == [3.5, 4.5, 2, 0.5, 0.5, 0]


def test_keypoints_are_named_by_the_file(tmp_path):
    names = ["nose", "left_eye", "right_eye", "left_wing"]
    categories = [{"id": 7, "name": "cat", "keypoints": names}, {"id": 8, "name": "dog"}]
    dataset = get_dataset(write_coco(tmp_path, categories=categories))
    assert dataset.keypoint_names == tuple(names)
    assert dataset.keypoint_flips == (("left_eye", "right_eye"),)
    categories[1]["keypoints"] = ["tail"]  # no list of names that is that of every object
    assert get_dataset(write_coco(tmp_path, categories=categories)).keypoint_names == ()


def test_coco_size_may_come_from_the_image(tmp_path):
    name = write_coco(tmp_path, images=[{"id": 9, "file_name": "nine.png"}])
    Image.new("RGB", (50, 40)).save(tmp_path / "images" / "nine.png")
    (record,) = get_dataset(name).records()
    assert (record["height"], record["width"]) == (40, 50)


def test_malformed_coco_file_is_named(tmp_path):
    with pytest.raises(UserError, match="a.json is not in COCO's instances format"):
        get_dataset(write_coco(tmp_path, annotations=None))
    annotation = {"id": 1, "image_id": 9, "category_id": 8, "bbox": [1, 2, 10, 20]}
    with pytest.raises(UserError, match="a.json: annotation 1 of image 9 is of category 8, whi"):
        get_dataset(write_coco(tmp_path, annotations=[annotation])).records()
    annotation["category_id"] = 7
    with pytest.raises(UserError, match=r"a.json: annotation 1 of image 9 has the bbox \[\]: it"):
        get_dataset(write_coco(tmp_path, annotations=[{**annotation, "bbox": []}])).records()
    below_zero = {"segmentation": {"size": [40, 50], "counts": [-1]}}
    with pytest.raises(UserError, match="a.json: annotation 1 .* whose runs do not make up its"):
        get_dataset(write_coco(tmp_path, annotations=[annotation | below_zero])).records()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="cannot read COCO annotations .*a.json"):
        get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")


@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_coco_records_equal_detectron2s(shared_data, kind, split):
    loader = pytest.importorskip("detectron2.data.datasets.coco")
    root = shared_data("coco_mini")
    json_file, images = root / "annotations" / f"{kind}_{split}.json", root / split
    theirs = loader.load_coco_json(str(json_file), str(images), f"moco_det_{kind}_{split}")
    for record in theirs:
        for annotation in record["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]
            del annotation["bbox_mode"]
    assert get_dataset(f"coco:{json_file}:{images}").records() == theirs
