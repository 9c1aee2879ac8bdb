"""LVIS v0.5 against hand-written files, a real one, and Detectron2's loader; other versions."""

import json

import pytest
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset

CATEGORIES = [{"id": i, "name": f"thing {i}", "frequency": "rcf"[i % 3]} for i in range(1, 1231)]


def write_lvis(path, **changes):
    """Two images, one object; a name of 2014 and one of 2017, as in the real files."""
    url = "http://images.cocodataset.org/val2017/000000000{:03d}.jpg"
    size = {"height": 40, "width": 50}
    content = {
        "images": [
            {
                "id": 285,
                "file_name": "COCO_val2014_000000000285.jpg",
                "coco_url": url.format(285),
                "neg_category_ids": [4, 9],
                "not_exhaustive_category_ids": [1230],
                **size,
            },
            {
                "id": 139,
                "file_name": "000000000139.jpg",
                "coco_url": url.format(139),
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
                **size,
            },
        ],
        "categories": CATEGORIES,
        "annotations": [
            {
                "id": 1,
                "image_id": 285,
                "category_id": 1230,
                "bbox": [1, 2, 10, 20],
                "area": 150,
                "segmentation": [[1, 2, 11, 2, 11, 22]],
            }
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_a_crowd_is_refused(tmp_path):
    """LVIS has none; its metric would wait for it to be found as an object."""
    path = write_lvis(tmp_path / "a.json")
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotation 1 of image 285 has iscrowd 1; LVIS has no"):
        get_dataset(f"lvis:{path}:{tmp_path}").records()


def test_records(tmp_path):
    path = write_lvis(tmp_path / "a.json")
    dataset = get_dataset(f"lvis:{path}:{tmp_path}")
    assert (dataset.evaluator, len(dataset.classes), dataset.classes[3]) == (
        "lvis",
        1230,
        "thing 4",
    )
    first, second = dataset.records()
    assert (first["image_id"], first["annotations"]) == (139, [])
    assert second == {
        "file_name": str(tmp_path / "000000000285.jpg"),
        "image_id": 285,
        "height": 40,
        "width": 50,
        "neg_category_ids": [4, 9],
        "not_exhaustive_category_ids": [1230],
        "annotations": [
            {
                "bbox": [1, 2, 11, 22],
                "category_id": 1229,
                "iscrowd": 0,
                "segmentation": [[1, 2, 11, 2, 11, 22]],
            }
        ],
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_builtin_names_below_the_root(tmp_path, monkeypatch, split):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name = f"lvis_v0.5_{split}"
    with pytest.raises(UserError, match=f"expected .*coco/{split}2017, .*set DETECTRON2_DATASETS"):
        get_dataset(name)
    for folder in ("coco/train2017", "coco/val2017", "lvis"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=f"expected .*lvis/{name}.json"):
        get_dataset(name)
    write_lvis(tmp_path / "lvis" / f"{name}.json")
    record = get_dataset(name).records()[1]
    assert record["file_name"] == str(tmp_path / "coco/val2017/000000000285.jpg")


@pytest.mark.parametrize(
    "name", ["lvis_v1_train", "lvis_v1_val", "lvis_v1.0_val", "lvis_v0.5_val_cocofied"]
)
def test_other_versions_are_refused_by_name(name):
    with pytest.raises(UserError, match=f"{name}: only LVIS v0.5 with its 1,230 classes.*paper"):
        get_dataset(name)


def test_a_slip_in_a_name_is_put_right():
    with pytest.raises(UserError, match="the nearest name is lvis_v0.5_train"):
        get_dataset("lvis_v0.5_trian")


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (
            CATEGORIES[:1203],
            "a.json has 1,203 categories, so it is LVIS v1: the paper's LVIS is v0.5",
        ),
        (CATEGORIES[:80], "a.json has 80 categories, so it is not LVIS v0.5"),
        ([{"id": i, "name": "x"} for i in range(1230)], "a.json is not LVIS v0.5: .*frequency"),
    ],
)
def test_other_versions_are_refused_by_content(tmp_path, categories, message):
    path = write_lvis(tmp_path / "a.json", categories=categories)
    with pytest.raises(UserError, match=message):
        get_dataset(f"lvis:{path}:{tmp_path}")


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids", "coco_url"])
def test_what_is_not_known_of_an_image_is_named(tmp_path, key):
    path = write_lvis(tmp_path / "a.json")
    content = json.loads(path.read_text())
    del content["images"][0][key]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"a.json: an image lacks {key}"):
        get_dataset(f"lvis:{path}:{tmp_path}").records()


def test_an_unknown_category_is_named(tmp_path):
    annotation = {"id": 1, "image_id": 285, "category_id": 1231, "bbox": [1, 2, 10, 20]}
    path = write_lvis(tmp_path / "a.json", annotations=[annotation])
    with pytest.raises(UserError, match="annotation 1 of image 285 is of category 1231, which"):
        get_dataset(f"lvis:{path}:{tmp_path}").records()


def test_photographs_are_found(shared_data):
    folder = shared_data("lvis_v0.5_val100")
    json_file = folder / "lvis_val_10_with_images.json"
    records = get_dataset(f"lvis:{json_file}:{folder / 'val2017_10images'}").records()
    assert len(records) == 10
    assert sum(len(record["annotations"]) for record in records) == 68
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])


def test_equal_to_detectron2s(shared_data):
    loader = pytest.importorskip("detectron2.data.datasets.lvis")
    json_file = shared_data("lvis_v0.5_val100") / "lvis_val_100.json"
    dataset = get_dataset(f"lvis:{json_file}:{json_file.parent}")
    theirs = loader.load_lvis_json(str(json_file), "", "lvis_v0.5_val")
    assert list(dataset.classes) == loader.get_lvis_instances_meta("lvis_v0.5")["thing_classes"]
    ours = dataset.records()
    assert len(ours) == 100
    for record, their in zip(ours, theirs, strict=True):
        for annotation in their["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]
            annotation["iscrowd"] = 0
            del annotation["bbox_mode"]
        assert record.pop("file_name").split("/")[-1] == their.pop("file_name").split("/")[-1]
        assert record == their
