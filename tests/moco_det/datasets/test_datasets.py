"""Data sets against hand-written files, against real ones, and against Detectron2's loaders."""

import json

import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets import VOC_CLASSES, get_dataset

SIZE = "<size><width>50</width><height>40</height></size>"


def voc_object(name, box, extra="<difficult>0</difficult>"):
    corners = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_voc(root, annotations, splits, suffix="jpg"):
    """`annotations`: image id -> XML within <annotation>; `splits`: name -> text of the list."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image_id, xml in annotations.items():
        Image.new("RGB", (50, 40)).save(root / "JPEGImages" / f"{image_id}.{suffix}")
        path = root / "Annotations" / f"{image_id}.xml"
        path.write_text(f"<annotation>{xml}</annotation>")
    for name, text in splits.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)


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


def test_voc_record(tmp_path):
    xml = SIZE + voc_object("cat", (1, 2, 50, 40)) + voc_object("ant", (5, 6, 7.5, 9))
    write_voc(tmp_path, {"a": xml}, {"train": "a\n"})
    (record,) = get_dataset(f"voc:{tmp_path}:train").records()
    assert record == {
        "file_name": str(tmp_path / "JPEGImages" / "a.jpg"),
        "image_id": "a",
        "height": 40,
        "width": 50,
        "annotations": [
            {"bbox": [0.0, 1.0, 50.0, 40.0], "category_id": 1, "iscrowd": 0, "difficult": 0},
            {"bbox": [4.0, 5.0, 7.5, 9.0], "category_id": 0, "iscrowd": 0, "difficult": 0},
        ],
    }


def test_voc_classes_are_those_of_all_splits(tmp_path):
    annotations = {
        "a": SIZE + voc_object("zebra", (1, 1, 9, 9)),
        "b": SIZE + voc_object("ant", (1, 1, 9, 9)),
    }
    write_voc(tmp_path, annotations, {"train": "a\n", "test": "b\n"})
    for split in ("train", "test"):
        dataset = get_dataset(f"voc:{tmp_path}:{split}")
        assert dataset.classes == ("ant", "zebra")
        assert (dataset.evaluator, dataset.eleven_point) == ("voc", False)
        assert len(dataset.records()) == 1


def test_voc_without_size_or_difficult_and_with_png(tmp_path):
    write_voc(tmp_path, {"a": voc_object("ant", (1, 1, 9, 9), extra="")}, {"t": "a\n"}, "png")
    (record,) = get_dataset(f"voc:{tmp_path}:t").records()
    assert (record["height"], record["width"]) == (40, 50)
    assert record["annotations"][0]["difficult"] == 0
    assert record["file_name"].endswith("a.png")


def test_voc_difficult_is_kept(tmp_path):
    xml = SIZE + voc_object("ant", (1, 1, 9, 9), "<difficult>1</difficult>")
    write_voc(tmp_path, {"a": xml}, {"t": "a\n"})
    assert get_dataset(f"voc:{tmp_path}:t").records()[0]["annotations"][0]["difficult"] == 1


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9)])
def test_voc_box_without_area_is_left_out(tmp_path, box):
    xml = SIZE + voc_object("ant", box) + voc_object("ant", (1, 1, 9, 9))
    write_voc(tmp_path, {"a": xml}, {"t": "a\n"})
    (record,) = get_dataset(f"voc:{tmp_path}:t").records()
    assert [annotation["bbox"] for annotation in record["annotations"]] == [[0, 0, 9, 9]]


def test_voc_split_keeps_its_order_and_may_have_flags_and_blank_lines(tmp_path):
    xml = SIZE + voc_object("ant", (1, 1, 9, 9))
    write_voc(tmp_path, {"b": xml, "a": xml}, {"t": "b  1\n\na -1\n"})
    assert [r["image_id"] for r in get_dataset(f"voc:{tmp_path}:t").records()] == ["b", "a"]


def test_builtin_voc_below_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    xml = SIZE + voc_object("tvmonitor", (1, 1, 9, 9))
    for year in (2007, 2012):
        write_voc(tmp_path / f"VOC{year}", {"a": xml}, {"trainval": "a\n"})
        dataset = get_dataset(f"voc_{year}_trainval")
        assert dataset.classes == VOC_CLASSES
        assert dataset.eleven_point == (year == 2007)
        assert dataset.records()[0]["annotations"][0]["category_id"] == 19


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


def test_missing_root_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(UserError) as error:
        get_dataset("voc_2007_test")
    assert f"expected {tmp_path}/VOC2007/JPEGImages" in str(error.value)
    assert "set DETECTRON2_DATASETS" in str(error.value)
    with pytest.raises(UserError, match="expected .*coco/annotations/instances_train2017.json"):
        get_dataset("coco_2017_train")


def test_default_root_is_datasets(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected datasets/VOC2012/JPEGImages"):
        get_dataset("voc_2012_val")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voc_2007_tset", "the nearest name is voc_2007_test; own data: voc:ROOT:SPLIT"),
        ("voc:only", "is written voc:ROOT:SPLIT"),
        ("yolo:a:b", "is written voc:ROOT:SPLIT"),
        ("voc:nowhere:train", "expected nowhere/JPEGImages, which does not exist"),
        ("coco:nowhere.json:images", "expected nowhere.json, which does not exist"),
    ],
)
def test_unusable_name_says_why(name, message):
    with pytest.raises(UserError, match=message):
        get_dataset(name)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (SIZE + "<object><name>ant</name></object>", "a.xml: an <object> lacks"),
        (SIZE + voc_object("ant", ("one", 1, 2, 2)), "a.xml: an <object> lacks"),
        ("<object>", "cannot read annotation .*a.xml"),
        (SIZE, "name no object"),
    ],
)
def test_malformed_voc_annotation_is_named(tmp_path, xml, message):
    write_voc(tmp_path, {"a": xml}, {"t": "a\n"})
    with pytest.raises(UserError, match=message):
        get_dataset(f"voc:{tmp_path}:t")


def test_voc_image_or_annotation_absent_is_named(tmp_path):
    write_voc(tmp_path, {"a": SIZE + voc_object("ant", (1, 1, 9, 9))}, {"t": "a\nb\n"})
    with pytest.raises(UserError, match="no image b"):
        get_dataset(f"voc:{tmp_path}:t").records()
    Image.new("RGB", (5, 5)).save(tmp_path / "JPEGImages" / "b.jpg")
    with pytest.raises(UserError, match="cannot read annotation .*b.xml"):
        get_dataset(f"voc:{tmp_path}:t").records()


def test_foreign_class_in_builtin_voc_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    xml = SIZE + voc_object("unicorn", (1, 1, 9, 9))
    write_voc(tmp_path / "VOC2012", {"a": xml}, {"val": "a\n"})
    with pytest.raises(UserError, match="a.xml: class 'unicorn' is not in aeroplane"):
        get_dataset("voc_2012_val").records()


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
        {**box, "id": 2, "segmentation": {"size": [2, 3], "counts": [1, 4, 1]}},
        {**box, "id": 3, "segmentation": [], "keypoints": []},
        {**box, "id": 4, "keypoints": [3, 4, 2, 0, 0, 0]},
    ]
    _, nine = get_dataset(write_coco(tmp_path, annotations=annotations)).records()
    polygons, runs, neither, keypoints = nine["annotations"]
    assert polygons["segmentation"] == [[1, 2, 3.5, 4, 5, 6]]
    assert coco_mask.decode(runs["segmentation"]).tolist() == [[0, 1, 1], [1, 1, 0]]
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
    with pytest.raises(UserError, match="a.json: no such field or category: 8"):
        get_dataset(write_coco(tmp_path, annotations=[annotation])).records()
    with pytest.raises(UserError, match="a.json: malformed annotation"):
        get_dataset(write_coco(tmp_path, annotations=[{**annotation, "bbox": []}])).records()
    below_zero = {"category_id": 7, "segmentation": {"size": [40, 50], "counts": [-1]}}
    with pytest.raises(UserError, match="a.json: malformed annotation"):
        get_dataset(write_coco(tmp_path, annotations=[annotation | below_zero])).records()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="cannot read COCO annotations .*a.json"):
        get_dataset(f"coco:{tmp_path}/a.json:{tmp_path}")


def test_bccd_counts(shared_data):
    """4,888 boxes in 364 images, 2 of them without area, in the official splits of 292 and 72."""
    root = shared_data("bccd_voc") / "BCCD"
    total = 0
    for split, images in (("trainval", 292), ("test", 72)):
        dataset = get_dataset(f"voc:{root}:{split}")
        assert dataset.classes == ("Platelets", "RBC", "WBC")
        records = dataset.records()
        assert len(records) == images
        total += sum(len(record["annotations"]) for record in records)
    assert total == 4888 - 2


def test_voc_records_equal_detectron2s(shared_data):
    loader = pytest.importorskip("detectron2.data.datasets.pascal_voc")
    root = shared_data("voc2012_40") / "VOC2012"
    dataset = get_dataset(f"voc:{root}:trainval")
    theirs = loader.load_voc_instances(str(root), "trainval", dataset.classes)
    assert [strip(record) for record in dataset.records()] == [strip(r) for r in theirs]


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


def strip(record):
    """What both VOC loaders give, with the file as a string."""
    annotations = [{key: a[key] for key in ("bbox", "category_id")} for a in record["annotations"]]
    return {**record, "file_name": str(record["file_name"]), "annotations": annotations}
