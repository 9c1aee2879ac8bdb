"""The doctor on COCO's format, with and without dense pose: healthy, then broken."""

import json

import pytest
from examined import doctor, problems
from PIL import Image

from moco_det.datasets import BUILT_IN

SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


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


MASKS = (*ONE_CLASS, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask")


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
        ({"bbox": None}, "annotation", "has the bbox None: it needs four finite numbers"),
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


# -- dense pose ------------------------------------------------------------------------------------

ON = (*ONE_CLASS, "MODEL.DENSEPOSE_ON", True)
POINTS = {"dp_x": [1.0], "dp_y": [2.0], "dp_I": [3], "dp_U": [0.5], "dp_V": [0.5]}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Function: fields of the two objects, to the name of the data set."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    Image.new("RGB", (50, 40)).save(tmp_path / "1.jpg")

    def write(first, second, path=tmp_path / "a.json"):
        item = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 50}],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{"id": 1, **item, **first}, {"id": 2, **item, **second}],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return f"densepose:{path}:{tmp_path}"

    return write


def test_healthy(own):
    (report,) = doctor(own(POINTS, {}), None, *ONE_CLASS).values()
    assert (report.images, report.objects, report.classes) == (1, 2, 1)
    assert problems(report) == []
    assert report.notes == ["1 of 2 objects have dense pose"]


def test_broken_annotations_are_named(own):
    masks = {"dp_masks": [{"size": [8, 8], "counts": "PP1"}] * 14}
    found = doctor(own(POINTS | {"dp_I": [25]}, POINTS | masks), None, *ONE_CLASS)
    (report,) = found.values()
    assert problems(report) == [
        ("dense pose", "annotation 1 of image 1 has 25 in dp_I, which goes from 0 to 24"),
        (
            "dense pose",
            "annotation 2 of image 1 has a mask of size [8, 8] in dp_masks, not of [256, 256]",
        ),
        ("dense pose", "no object has dp_x, dp_y, dp_I, dp_U and dp_V"),
    ]


def test_files_that_training_and_scoring_read(own, tmp_path):
    name = own(POINTS, POINTS)
    folder, site = tmp_path / "densepose" / "data", "https://dl.fbaipublicfiles.com/densepose/data"

    def lacking(*names):
        return [
            ("files", f"{folder / file} does not exist: download {site}/{file}") for file in names
        ]

    geodesics = ("SMPL_subdiv.mat", "SMPL_SUBDIV_TRANSFORM.mat", "Pdist_matrix.pkl")
    report = doctor(name, None, *ON)[name]
    assert problems(report) == lacking("UV_symmetry_transforms.mat", *geodesics)
    report = doctor(name, None, *ON, "INPUT.RANDOM_FLIP", "none")[name]
    assert problems(report) == lacking(*geodesics)
    folder.mkdir(parents=True)
    for file in geodesics:
        (folder / file).touch()
    report = doctor(name, None, *ON)[name]
    assert problems(report) == lacking("UV_symmetry_transforms.mat")


def test_dense_pose_is_missed_where_the_model_learns_it(own):
    name = own(POINTS, POINTS).replace("densepose:", "coco:", 1)
    (check, text), *_ = problems(doctor(name, None, *ON)[name])
    assert check == "classes"
    assert "has no dense pose, but MODEL.DENSEPOSE_ON is True" in text


def test_annotations_listed_twice_are_excused_in_the_minivals_only(own, tmp_path):
    for name in (name for name in BUILT_IN if name.startswith("densepose_")):
        folder = "train2014" if name.endswith("train") else "val2014"
        (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
        json_name = f"densepose_{name.removeprefix('densepose_coco_2014_')}2014.json"
        json_name = json_name.replace("_1002014", "2014_100")
        own(POINTS, POINTS | {"id": 1}, tmp_path / "coco" / "annotations" / json_name)
        report = doctor(name, None, *ONE_CLASS)[name]
        twice = ("list", "annotation 1 is listed 2 times")
        assert (twice in problems(report)) == name.endswith("train")
        excused = "1 annotations are listed more than once, as in the official file"
        assert (excused in report.notes) == ("minival" in name)
