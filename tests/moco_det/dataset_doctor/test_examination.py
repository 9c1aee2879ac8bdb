"""The doctor on healthy sets, and on sets that were broken in a known way."""

import json

import pytest
from examined import CONFIGS, doctor, problems
from PIL import Image
from tiny_voc import write_tiny_voc

from moco_det.common.errors import UserError
from moco_det.config.loading import load_config
from moco_det.dataset_doctor import describe, examine, table
from moco_det.dataset_doctor.report import spread

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


@pytest.fixture
def voc(tmp_path):
    return write_tiny_voc(tmp_path / "voc")


def test_healthy_voc(voc):
    reports = doctor(f"voc:{voc}:train", f"voc:{voc}:test", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    train, test = reports.values()
    assert (train.images, train.objects, train.classes, train.decoded) == (8, 8, 2, 8)
    assert (test.images, test.objects, test.classes, test.decoded) == (4, 4, 2, 4)
    assert train.problems == test.problems == []


def test_all_that_is_wrong_with_a_voc_set_is_found(voc):
    annotations, images = voc / "Annotations", voc / "JPEGImages"
    photographs = {name: images / f"{name}.jpg" for name in ("000", "001", "002", "003")}
    photographs["000"].unlink()
    photographs["001"].write_bytes(photographs["001"].read_bytes()[:400])  # cut off in transfer
    Image.new("RGB", (30, 20)).save(photographs["002"])
    photographs["003"].write_bytes(b"")
    xml = (annotations / "004.xml").read_text()
    empty = "<xmin>5</xmin><ymin>7</ymin><xmax>5</xmax><ymax>7</ymax>"
    box = xml[xml.index("<xmin>") : xml.index("</bndbox>")]
    (annotations / "004.xml").write_text(xml.replace(box, empty))
    (annotations / "005.xml").write_text("<annotation>")
    (annotations / "006.xml").unlink()
    text = (annotations / "007.xml").read_text().replace("</xmax>", "x</xmax>")
    (annotations / "007.xml").write_text(text)
    split = voc / "ImageSets/Main/train.txt"
    split.write_text(split.read_text() + "\n004\nabsent\n")

    (report,) = doctor(f"voc:{voc}:train").values()
    found = problems(report)
    for check, *words in (
        ("image", photographs["000"], "does not exist"),
        ("image", photographs["001"], "cannot be decoded"),
        ("size", photographs["002"], "is 30x20 pixels, its annotation says 64x48"),
        ("image", photographs["003"], "cannot be decoded"),
        ("area", annotations / "004.xml", "a box of zero area, (5, 7, 5, 7)"),
        ("annotation", annotations / "005.xml", "cannot be read"),
        ("annotation", annotations / "006.xml", "cannot be read"),
        ("annotation", annotations / "007.xml", "lacks the numbers of a <bndbox>"),
        ("list", split, "lists 004 2 times"),
        ("annotation", annotations / "absent.xml", "cannot be read"),
        ("image", images / "absent.jpg", "does not exist"),
    ):
        matching = [text for c, text in found if c == check and all(str(w) in text for w in words)]
        assert matching, (check, words)
    assert {check for check, _ in found} == {
        *("image", "size", "area", "annotation", "list", "classes")
    }


def test_classes_that_do_not_fit(voc):
    (report,) = doctor(f"voc:{voc}:train").values()  # the model has 80
    ((check, text),) = problems(report)
    assert check == "classes"
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 80" in text
    (report,) = doctor(f"voc:{voc}:train", config="voc_R50_FCN16_30k_moco").values()
    assert "has objects" in problems(report)[0][1]


def test_masks_asked_of_voc(voc):
    opts = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.MASK_ON", True)
    (report,) = doctor(f"voc:{voc}:train", None, *opts).values()
    assert [check for check, _ in problems(report)] == ["mask"]


def test_train_and_test_with_other_classes(voc, tmp_path):
    other = write_tiny_voc(tmp_path / "other")
    for path in (other / "Annotations").iterdir():
        path.write_text(path.read_text().replace("square", "triangle"))
    reports = doctor(f"voc:{voc}:train", f"voc:{other}:test", "MODEL.ROI_HEADS.NUM_CLASSES", 2)
    first, second = reports.values()
    assert first.problems == []
    assert "not those of" in problems(second)[0][1]


def test_missing_official_set_is_reported_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    reports = doctor("voc_2007_trainval", "voc_2007_test", "MODEL.ROI_HEADS.NUM_CLASSES", 20)
    assert [len(report.problems) for report in reports.values()] == [3, 3]
    for report, file in zip(reports.values(), ("trainval_06-Nov", "test_06-Nov"), strict=True):
        assert {check for check, _ in problems(report)} == {"layout"}
        assert f"VOC{file}-2007.tar" in report.remedy
        assert f"{tmp_path}/VOC2007" in report.remedy


def test_own_set_has_no_remedy(tmp_path):
    (report,) = doctor(f"voc:{tmp_path}/nowhere:train").values()
    assert len(report.problems) == 3
    assert report.remedy == ""
    assert "download" not in describe(report, 0)


def test_official_count_and_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_tiny_voc(tmp_path / "VOC2007")
    report = doctor("voc_2007_test")["voc_2007_test"]
    found = problems(report)
    assert ("count", "4 images; the official set has 4,952") in found
    assert sum("none of VOC's 20 classes" in text for _, text in found) == 4


@pytest.fixture
def coco(tmp_path):
    """Function: annotations, further fields of the file -> the data set's name."""
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    for number in (1, 2):
        Image.new("RGB", (40, 30)).save(image_dir / f"{number}.jpg")

    def write(annotations, **content):
        images = [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in (1, 2)]
        content = {"images": images, "categories": [{"id": 7, "name": "thing"}]} | content
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content | {"annotations": annotations}))
        return f"coco:{path}:{image_dir}"

    return write


def annotation(number, **fields):
    plain = {"image_id": 1, "category_id": 7, "bbox": [10, 10, 10, 10], "segmentation": SQUARE}
    return {"id": number, **plain, **fields}


ONE_CLASS = ("MODEL.ROI_HEADS.NUM_CLASSES", 1)
MASKS = (*ONE_CLASS, "MODEL.MASK_ON", True)


def test_healthy_coco(coco):
    crowd = {"size": [30, 40], "counts": [0, 100, 1100]}
    name = coco([annotation(1), annotation(2, segmentation=crowd, iscrowd=1)])
    (report,) = doctor(name, None, *MASKS).values()
    assert problems(report) == []
    assert (report.images, report.objects, report.classes, report.decoded) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("fields", "check", "text"),
    [
        ({"bbox": [1, 1, 5, 0]}, "area", "has a box of zero area, [1, 1, 5, 0]"),
        ({"bbox": [40, 1, 5, 5]}, "box", "has a box outside of its image, [40, 1, 5, 5]"),
        ({"image_id": 9}, "annotation", "is of an image that the file does not list"),
        ({"category_id": 8}, "classes", "is of category 8, which is not listed"),
        ({"segmentation": []}, "mask", "has no mask, and MODEL.MASK_ON is True"),
        (
            {"segmentation": [[1, 1, 5, 5], *SQUARE]},
            "mask",
            "has 1 of 2 polygons with less than 3 points",
        ),
        (
            {"segmentation": {"size": [40, 30], "counts": [0, 5, 1195]}},
            "mask",
            "has a mask of (height, width) [40, 30]; its image has [30, 40]",
        ),
        (
            {"segmentation": {"size": [30, 40], "counts": [1200]}},
            "mask",
            "has a mask without a pixel",
        ),
        ({"keypoints": [1, 1, 2]}, "keypoints", "has 3 numbers for 0 keypoints; it needs 3"),
        ({"bbox": None}, "annotation", "is malformed: TypeError"),
    ],
)
def test_wrong_annotation_is_found_among_right_ones(coco, fields, check, text):
    name = coco([annotation(1), annotation(2, **fields), annotation(3)])
    (report,) = doctor(name, None, *MASKS).values()
    ((found, message),) = problems(report)
    assert found == check
    assert message.startswith(f"annotation 2 of image {fields.get('image_id', 1)} {text}")


def test_mask_is_not_needed_without_mask_head(coco):
    (report,) = doctor(coco([annotation(1, segmentation=[])]), None, *ONE_CLASS).values()
    assert problems(report) == []


def test_keypoints_that_the_file_does_not_name(coco):
    opts = (*ONE_CLASS, "MODEL.KEYPOINT_ON", True)
    ((check, text),) = problems(doctor(coco([annotation(1)]), None, *opts).popitem()[1])
    assert check == "keypoints"
    assert "name 0 keypoints, MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 17" in text


def test_files_and_ids_of_coco(coco, tmp_path):
    images = [
        {"id": 1, "file_name": "1.jpg", "height": 30, "width": 41},
        {"id": 1, "file_name": "2.jpg"},
        {"id": 3, "file_name": "3.jpg"},
        {"id": 4},
    ]
    name = coco([annotation(1), annotation(1)], images=images)
    found = problems(doctor(name, None, *ONE_CLASS).popitem()[1])
    assert found[0] == ("list", "image 1 is listed twice")
    assert found[1][1].startswith("an image lacks file_name")
    assert found[2] == ("list", "annotation 1 is listed 2 times")
    assert found[3] == ("image", f"{tmp_path}/images/3.jpg does not exist")
    assert found[4][1] == f"{tmp_path}/images/1.jpg is 40x30 pixels, its annotation says 41x30"


def test_no_image_at_all_is_one_problem(coco, tmp_path):
    name = coco([annotation(1)])
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    ((check, text),) = problems(doctor(name, None, *ONE_CLASS).popitem()[1])
    assert check == "layout"
    assert text.startswith("none of the 2 images exists")


def test_file_that_is_no_coco_file(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text("[]")
    found = problems(doctor(f"coco:{path}:{tmp_path}").popitem()[1])
    assert found[0][0] == "annotation"
    assert "not in COCO's instances format" in found[0][1]


def test_flaws_of_the_official_file_are_no_problem(tmp_path, monkeypatch):
    """train2017 has two boxes without height; one more would be the user's."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/train2017").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "coco/train2017/1.jpg")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "categories": [{"id": 7, "name": "thing"}],
    }
    for flaws, kinds in ((2, ["count", "count"]), (3, ["area"] * 3 + ["count", "count"])):
        flat = [annotation(i, bbox=[1, 1, 5, 0]) for i in range(flaws)]
        path = tmp_path / "coco/annotations/instances_train2017.json"
        path.write_text(json.dumps(content | {"annotations": flat}))
        report = doctor("coco_2017_train", None, *ONE_CLASS)["coco_2017_train"]
        assert [check for check, _ in problems(report)] == kinds
        assert len(report.notes) == (flaws == 2)


def test_lvis_of_another_version(tmp_path):
    path = tmp_path / "annotations.json"
    categories = [{"id": i, "name": str(i), "frequency": "f"} for i in range(1, 1204)]
    image = {"id": 1, "coco_url": "x/train2017/1.jpg", "height": 30, "width": 40}
    content = {"images": [image], "annotations": [], "categories": categories}
    path.write_text(json.dumps(content))
    Image.new("RGB", (40, 30)).save(tmp_path / "1.jpg")
    found = problems(doctor(f"lvis:{path}:{tmp_path}").popitem()[1])
    assert [check for check, _ in found] == ["version"]
    assert "LVIS v1" in found[0][1]


def test_config_without_data_sets():
    with pytest.raises(UserError, match="DATASETS.TRAIN and DATASETS.TEST are empty"):
        examine(load_config(CONFIGS / "Base-RCNN-FPN-BN.yaml"), None)


def test_spread_takes_the_ends():
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread(range(3), 5) == spread(range(3), None) == [0, 1, 2]
    assert spread(range(3), 1) == [0]
    assert spread(range(3), 0) == []


def test_sample_is_decoded_and_the_rest_is_looked_for(voc):
    (voc / "JPEGImages/000.jpg").write_bytes(b"")
    (voc / "JPEGImages/001.jpg").write_bytes(b"")
    (voc / "JPEGImages/002.jpg").unlink()
    name = f"voc:{voc}:train"
    report = doctor(name, None, "MODEL.ROI_HEADS.NUM_CLASSES", 2, limit=2)[name]
    assert report.decoded == 2
    assert sum("cannot be decoded" in text for _, text in problems(report)) == 1
    assert sum("does not exist" in text for _, text in problems(report)) == 1


def test_description_lists_some_of_each_kind_and_counts_the_rest(voc):
    for number in range(5):
        (voc / f"JPEGImages/{number:03d}.jpg").write_bytes(b"")
    (report,) = doctor(f"voc:{voc}:train").values()
    text = describe(report, 2)
    assert text.count("cannot be decoded") == 2
    assert "image: and 3 more" in text
    assert describe(report, 0).count("cannot be decoded") == 5
    assert f"| {report.name} |" in table([report])


def test_real_sets(shared_data):
    bccd = shared_data("bccd_voc") / "BCCD"
    three = ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    train, test = doctor(f"voc:{bccd}:train", f"voc:{bccd}:trainval", *three, limit=20).values()
    assert (train.images, test.images) == (205, 292)
    assert [check for check, _ in problems(test)] == ["area", "area"]
    coco = shared_data("coco_mini")
    for split in ("train", "val"):
        for kind, run in (("instances", "1x"), ("person_keypoints", "keypoint_2x")):
            name = f"coco:{coco}/annotations/{kind}_{split}2017.json:{coco}/{split}2017"
            report = doctor(name, config=f"coco_R50_FPN_{run}_moco", limit=5)[name]
            assert (problems(report), report.images) == ([], 40)
    lvis = shared_data("lvis_v0.5_val100")
    name = f"lvis:{lvis}/lvis_val_10_with_images.json:{lvis}/val2017_10images"
    report = doctor(name, config="lvis_R50_FPN_1x_moco")[name]
    assert (problems(report), report.objects) == ([], 68)
