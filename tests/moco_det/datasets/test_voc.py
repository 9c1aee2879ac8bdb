"""VOC's layout against hand-written files, against real ones, and against Detectron2's loader."""

import re
import time

import pytest
from examined import doctor, problems
from PIL import Image

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


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (5, 5, 5, 9), (5, 5, 9, 5)])
def test_voc_box_of_one_pixel_is_kept(tmp_path, box):
    """In inclusive numbers it has an area, and Detectron2 trains on it and scores it."""
    write_voc(tmp_path, {"a": SIZE + voc_object("ant", box)}, {"t": "a\n"})
    (record,) = get_dataset(f"voc:{tmp_path}:t").records()
    (annotation,) = record["annotations"]
    x0, y0, x1, y1 = box
    assert annotation["bbox"] == [x0 - 1, y0 - 1, x1, y1]


@pytest.mark.parametrize("box", [(5, 5, 4, 9), (5, 5, 9, 4), (9, 5, 5, 9)])
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
    with pytest.raises(UserError, match="a.xml: class 'unicorn' is not one of VOC's 20"):
        get_dataset("voc_2012_val").records()


def test_bccd_counts(shared_data):
    """4,888 boxes in 364 images, in the official splits of 292 and 72."""
    root = shared_data("bccd_voc") / "BCCD"
    total = 0
    for split, images in (("trainval", 292), ("test", 72)):
        dataset = get_dataset(f"voc:{root}:{split}")
        assert dataset.classes == ("Platelets", "RBC", "WBC")
        records = dataset.records()
        assert len(records) == images
        total += sum(len(record["annotations"]) for record in records)
    assert total == 4888


def test_voc_records_equal_detectron2s(shared_data):
    loader = pytest.importorskip("detectron2.data.datasets.pascal_voc")
    root = shared_data("voc2012_40") / "VOC2012"
    dataset = get_dataset(f"voc:{root}:trainval")
    theirs = loader.load_voc_instances(str(root), "trainval", dataset.classes)
    assert [strip(record) for record in dataset.records()] == [strip(r) for r in theirs]


def strip(record):
    """What both VOC loaders give, with the file as a string."""
    annotations = [{key: a[key] for key in ("bbox", "category_id")} for a in record["annotations"]]
    return {**record, "file_name": str(record["file_name"]), "annotations": annotations}


def test_encodings_and_the_twins_of_macos(tmp_path):
    """GB2312 is beyond the parser; ._a.xml is no annotation."""
    xml = SIZE + voc_object("\u7ea2", (1, 1, 9, 9))
    write_voc(tmp_path, {"a": xml}, {"t": "\ufeffa\n"})
    path = tmp_path / "Annotations" / "a.xml"
    for encoding in ("gb2312", "utf-8-sig", "utf-16"):
        stated = "utf-8" if encoding == "utf-8-sig" else encoding
        text = f'<?xml version="1.0" encoding="{stated}"?><annotation>{xml}</annotation>'
        path.write_bytes(text.encode(encoding))
        path.with_name("._a.xml").write_bytes(b"\0\5\26\7")
        dataset = get_dataset(f"voc:{tmp_path}:t")
        assert dataset.classes == ("\u7ea2",)
        assert len(dataset.records()[0]["annotations"]) == 1
    path.write_bytes(text.replace("utf-16", "gb2312").encode("latin-1", "replace")[:-4] + b"\xff")
    with pytest.raises(UserError, match="cannot read annotation .*a.xml: "):
        get_dataset(f"voc:{tmp_path}:t")


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (voc_object("ant", (1, 1, "inf", 9)), r"'ant' has the box \('1', '1', 'inf', '9'\): it"),
        (voc_object("ant", (1, "nan", 9, 9)), "'ant' has the box"),
        (voc_object("ant", (1, 1, 1e9, 9)), "'ant' has the box"),
        (voc_object(" ", (1, 1, 9, 9)), "an <object> lacks a <name>"),
        (
            voc_object("ant", (1, 1, 9, 9), "<difficult>Unspecified</difficult>"),
            "'ant' has <difficult>Unspecified</difficult>, which is 0 or 1",
        ),
    ],
)
def test_an_object_is_refused_in_training_and_by_the_doctor(tmp_path, xml, message):
    write_voc(tmp_path, {"a": SIZE + xml, "b": SIZE + voc_object("ant", (1, 1, 9, 9))}, {"t": "a"})
    name = f"voc:{tmp_path}:t"
    with pytest.raises(UserError, match=f"a.xml: {message}"):
        get_dataset(name)
    found = problems(doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 1)[name])
    assert re.search(f"a.xml: {message}", found[0][1])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\na\n", "t.txt lists a 2 times: keep one of the lines"),
        ("a.jpg\n", r"there is no image a.jpg.\*; write a instead"),
        ("JPEGImages/a.jpg\n", r"there is no image JPEGImages/a.jpg.\*; write a instead"),
        ("a\0\n", "t.txt: it has a zero byte"),
        ("a\n" + "x" * 5000, f"t.txt lists '{'x' * 59}...: no file can have so long a name$"),
    ],
)
def test_a_list_is_refused_in_training_and_by_the_doctor(tmp_path, lines, message):
    write_voc(tmp_path, {"a": SIZE + voc_object("ant", (1, 1, 9, 9))}, {"t": lines})
    name = f"voc:{tmp_path}:t"
    with pytest.raises(UserError, match=message):
        get_dataset(name).records()
    found = problems(doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 1)[name])
    assert any(re.search(message, text) for _, text in found)


def test_a_list_that_is_no_text(tmp_path):
    write_voc(tmp_path, {"a": SIZE + voc_object("ant", (1, 1, 9, 9))}, {"t": "a"})
    path = tmp_path / "ImageSets" / "Main" / "t.txt"
    path.write_bytes("a\n".encode("utf-16"))  # as PowerShell writes it
    assert len(get_dataset(f"voc:{tmp_path}:t").records()) == 1
    path.write_bytes(b"\xff\xe9\n")
    with pytest.raises(UserError, match=r"cannot read .*t\.txt: it is not in UTF-8"):
        get_dataset(f"voc:{tmp_path}:t").records()


def test_a_long_list_of_missing_files_does_not_stall(tmp_path):
    write_voc(tmp_path, {"a": SIZE + voc_object("ant", (1, 1, 9, 9))}, {"t": "a"})
    lines = "\n".join(f"missing{i}" for i in range(20_000))
    (tmp_path / "ImageSets" / "Main" / "t.txt").write_text(lines)
    start, name = time.process_time(), f"voc:{tmp_path}:t"
    report = doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 1)[name]
    images = [text for check, text in report.problems if check == "image"]
    assert len(images) == 1001
    assert images[-1] == "and 19,000 more, 20,000 in all"
    assert time.process_time() - start < 10
