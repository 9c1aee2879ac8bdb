"""Samples of each task, from a run folder made by hand; which boxes are right, also by hand."""

import base64
import html
import io
import json
import re
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import pages
from moco_det.benchmark.synthetic import tasks
from moco_det.datasets import get_dataset
from moco_det.evaluation.predictions import save_predictions

EXPERIMENT = Experiment("toy", "", 1, 1, 1, classes=("nothing", "first"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    tasks.write_scenes(folder, "test", seed=1, count=6)
    tasks.write_hearts(folder, "test", seed=1, count=6)
    return folder


def names(root):
    return {
        "boxes": f"voc:{root}/scenes:test",
        "masks": f"coco:{root}/scenes/instances_test.json:{root}/scenes/JPEGImages",
        "keypoints": f"coco:{root}/hearts/keypoints_test.json:{root}/hearts/test",
    }


def perfect(record):
    """The annotations as a prediction, the last object with a score too low to be shown."""
    found = record["annotations"]
    scores = [1.0] * (len(found) - 1) + [0.1]
    prediction = {
        "image_id": record["image_id"],
        "boxes": torch.tensor([a["bbox"] for a in found]).float(),
        "classes": torch.tensor([a["category_id"] for a in found]),
        "scores": torch.tensor(scores),
    }
    if "keypoints" in found[0]:
        prediction["keypoints"] = torch.tensor([a["keypoints"] for a in found]).reshape(-1, 4, 3)
    return prediction


def finished(tmp_path, dataset_name, predictions, row="moco"):
    run = Run(EXPERIMENT, row, 1, Path("c.yaml"), ())
    settings = Settings(tmp_path, "native")
    folder = settings.folder(run)
    folder.write_record({"state": "finished"})
    (folder.path / "config.yaml").write_text(json.dumps({"DATASETS": {"TEST": [dataset_name]}}))
    save_predictions(str(folder.path), dataset_name, predictions)
    return run, settings


def pixels(sample):
    data = base64.b64decode(sample.uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize("task", ["boxes", "masks", "keypoints"])
def test_annotations_and_rows_side_by_side(root, tmp_path, task):
    name = names(root)[task]
    records = get_dataset(name).records()
    run, settings = finished(tmp_path, name, [perfect(record) for record in records])
    images = pages.samples_of(EXPERIMENT, [run], settings)
    assert len(images) == pages.SAMPLES
    assert [s.image_id for s in (images[0][0], images[-1][0])] == [
        str(records[0]["image_id"]),
        str(records[-1]["image_id"]),
    ]
    for annotated, found in images:
        assert (annotated.row, found.row) == (None, "moco")
        shapes = {pixels(annotated).shape, pixels(found).shape}
        assert shapes == {(256, 256, 3)}  # 128 pixels, enlarged
        assert np.abs(pixels(annotated) - pixels(found)).max() > 50  # an object is not shown


def test_label_maps_under_the_experiments_own_names(root, tmp_path, monkeypatch):
    name = f"voc_sem_seg:{root}/scenes:test"
    records = get_dataset(name).records()
    run, settings = finished(
        tmp_path, name, [{"image_id": r["image_id"], "sem_seg": []} for r in records]
    )
    used = []
    draw = pages.visualize.draw_labels
    monkeypatch.setattr(
        pages.visualize,
        "draw_labels",
        lambda image, labels, classes, shades: (
            used.append(tuple(classes)) or draw(image, labels, classes)
        ),
    )
    images = pages.samples_of(EXPERIMENT, [run], settings)
    assert {classes[:3] for classes in used} == {("nothing", "first", "bicycle")}
    annotated, found = images[0]
    assert np.abs(pixels(annotated) - pixels(found)).max() > 50


def test_nothing_is_shown_of_what_is_not_finished(tmp_path):
    run = Run(EXPERIMENT, "moco", 1, Path("c.yaml"), ())
    assert pages.samples_of(EXPERIMENT, [run], Settings(tmp_path, "native")) == []


def test_missing_predictions_are_a_warning(root, tmp_path, capsys):
    name = names(root)["boxes"]
    run, settings = finished(tmp_path, name, [])
    (path,) = (settings.folder(run).path / "inference").iterdir()
    path.write_text("[{")
    assert pages.sample_pictures([run], settings) == {}
    assert "warning: no pictures of toy: cannot read predictions" in capsys.readouterr().out


# -- boxes, right and wrong -----------------------------------------------------------------------


def boxes(rows, classes, scores=None):
    return pages.Boxes(
        np.array(rows, np.float32).reshape(-1, 4),
        np.array(classes, np.int64),
        None if scores is None else np.array(scores, np.float32),
    )


TARGETS = boxes([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1])


def annotated(path):
    """A record of the image with the targets."""
    annotations = [
        {"bbox": box, "category_id": int(category)}
        for box, category in zip(TARGETS.boxes.tolist(), TARGETS.classes, strict=True)
    ]
    return {"file_name": str(path), "annotations": annotations}


def prediction(rows, classes, scores):
    return {"boxes": rows, "classes": classes, "scores": scores}


@pytest.mark.parametrize(
    ("rows", "classes", "scores", "right"),
    [
        ([[0, 0, 10, 10]], [0], [0.9], [True]),
        ([[0, 0, 10, 10]], [1], [0.9], [False]),  # the other class
        ([[0, 0, 10, 5]], [0], [0.9], [True]),  # IoU exactly 0.5
        ([[0, 0, 10, 4.9]], [0], [0.9], [False]),
        ([[0, 0, 10, 9], [0, 0, 10, 10]], [0, 0], [0.6, 0.8], [False, True]),  # the surer one
        ([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [0.9, 0.1], [True, True]),
        ([], [], [], []),
    ],
)
def test_matched(rows, classes, scores, right):
    assert pages.matched(boxes(rows, classes, scores), TARGETS).tolist() == right


def test_without_objects_all_is_wrong():
    nothing = boxes([], [])
    found = boxes([[0, 0, 5, 5]], [0], [0.9])
    assert pages.matched(found, nothing).tolist() == [False]


def test_words():
    found = boxes([[0, 0, 10, 10], [0, 0, 3, 3]], [0, 0], [0.9, 0.7])
    right = pages.matched(found, TARGETS)
    assert pages.in_words(right, TARGETS) == "1 of 2 objects found, 1 false detection"
    words = "1 of 2 objects found, 1 false detection, 1 of them on others and not drawn"
    assert pages.in_words(right, TARGETS, hidden=1) == words


def test_wrong_detections_on_another_are_not_drawn():
    """Six boxes on one object: the right one, whatever its score, and none of the others."""
    one = [10, 10, 30, 30]
    rows = [one, [11, 10, 31, 30], [10, 12, 30, 32], one, [60, 60, 70, 70], [61, 60, 71, 70]]
    found = boxes(rows, [0, 1, 0, 0, 1, 0], [0.5, 0.9, 0.4, 0.6, 0.35, 0.8])
    right = np.array([False, False, False, True, False, False])
    assert sorted(pages.thinned(found, right)) == [3, 5]
    both = np.array([True, False, False, True, False, False])
    assert sorted(pages.thinned(found, both)) == [0, 3, 5]
    assert pages.thinned(boxes([], [], []), np.zeros(0, bool)).tolist() == []


@pytest.mark.parametrize(("zone", "said"), [("Asia/Kolkata", r"UTC\+05:30"), ("UTC", "UTC")])
def test_the_time_has_its_zone(monkeypatch, zone, said):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert re.fullmatch(rf"\d+ \w+ \d{{4}}, \d\d:\d\d {said}", pages.now())
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("side", [60, 1200])
def test_picture_embeds_the_image_and_draws_in_its_pixels(tmp_path, side):
    path = tmp_path / "a.png"
    image = np.random.default_rng(0).integers(0, 255, (side, side * 2, 3), np.uint8)
    cv2.imwrite(str(path), cv2.GaussianBlur(image, (0, 0), 5))
    found = prediction([[0, 0, 10, 10], [20, 20, 40, 41], [1, 2, 3, 4]], [0, 0, 0], [0.9, 0.6, 0.2])
    svg = pages.judged_picture(annotated(path), found, ("<a>", "b"), 'an "image"').svg
    assert f'viewBox="0 0 {side * 2} {side}"' in svg
    data = np.frombuffer(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]), np.uint8)
    embedded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert embedded.shape[1] == min(side * 2, pages.JUDGED_SIDE)
    assert svg.count('class="truth"') == 2
    assert svg.count('class="right"') == 1
    assert 'class="wrong" x="20.0" y="20.0" width="20.0" height="21.0"' in svg
    assert "&lt;a&gt; 90%" in svg
    assert "✕ &lt;a&gt; 60%" in svg
    assert "20%" not in svg  # below the score that is shown
    (label,) = re.findall(r'aria-label="(.*?)"', svg)
    assert html.unescape(label) == 'an "image": 1 of 2 objects found, 1 false detection'


def test_labels_stay_inside_the_image(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((100, 100, 3), np.uint8))
    found = prediction([[95, 0, 100, 5], [0, 98, 9, 100]], [0, 0], [0.9, 0.9])
    svg = pages.judged_picture(annotated(path), found, ("a_long_class",), "x").svg
    plates = re.findall(r'class="plate \w+" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg)
    assert len(plates) == 2
    for plate in plates:
        x, y, width, height = map(float, plate)
        assert 0 <= x <= x + width <= 100.1
        assert 0 <= y <= y + height <= 100.1


def test_the_marks_have_colours_of_no_row():
    css = (Path(pages.__file__).with_name("templates") / "report.css").read_text()
    marks = set(
        re.findall(r"\.photo (?:\.plate)?\.(?:right|wrong) \{ (?:stroke|fill): (#\w+)", css)
    )
    rows = set(re.findall(r"--(?:moco|random|shade): (#\w+)", css))
    assert (len(marks), len(rows)) == (2, 10)
    for mark in marks:
        for row in rows:
            channels = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (mark, row))
            assert np.abs(np.subtract(*channels)).sum() > 120, (mark, row)


def test_each_key_is_drawn_as_its_curve():
    css = (Path(pages.__file__).with_name("templates") / "report.css").read_text()
    dashes = {"7 4": "dashed", "2 3": "dotted"}
    for curves, dash in re.findall(
        r"((?:\.chart \.line\.s\d,? ?)+) \{ stroke-dasharray: (.+); \}", css
    ):
        keys = ", ".join(f".key.{name}::before" for name in re.findall(r"s\d", curves))
        assert f"{keys} {{ border-top-style: {dashes[dash]}; }}" in css
    assert css.count("border-top-style") == 2
