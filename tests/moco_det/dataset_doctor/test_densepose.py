"""The doctor on dense pose: annotations that were broken in a known way, files that lack."""

import json

import pytest
from examined import doctor, problems
from PIL import Image

from moco_det.datasets import densepose

SETTINGS = ("MODEL.ROI_HEADS.NUM_CLASSES", 1)
ON = (*SETTINGS, "MODEL.DENSEPOSE_ON", True)
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
    (report,) = doctor(own(POINTS, {}), None, *SETTINGS).values()
    assert (report.images, report.objects, report.classes) == (1, 2, 1)
    assert problems(report) == []
    assert report.notes == ["1 of 2 objects have dense pose"]


def test_broken_annotations_are_named(own):
    masks = {"dp_masks": [{"size": [8, 8], "counts": "PP1"}] * 14}
    found = doctor(own(POINTS | {"dp_I": [25]}, POINTS | masks), None, *SETTINGS)
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
    for name in densepose.NAMES:
        folder = "train2014" if name.endswith("train") else "val2014"
        (tmp_path / "coco" / folder).mkdir(parents=True, exist_ok=True)
        json_name = f"densepose_{name.removeprefix('densepose_coco_2014_')}2014.json"
        json_name = json_name.replace("_1002014", "2014_100")
        own(POINTS, POINTS | {"id": 1}, tmp_path / "coco" / "annotations" / json_name)
        report = doctor(name, None, *SETTINGS)[name]
        twice = ("list", "annotation 1 is listed 2 times")
        assert (twice in problems(report)) == name.endswith("train")
        excused = "1 annotations are listed more than once, as in the official file"
        assert (excused in report.notes) == ("minival" in name)
