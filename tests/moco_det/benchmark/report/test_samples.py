"""Sample predictions of each task, from a run folder made by hand out of the truth itself."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import samples
from moco_det.benchmark.synthetic import tasks as procedural_tasks
from moco_det.datasets import get_dataset
from moco_det.evaluation.predictions import save_predictions

EXPERIMENT = Experiment("toy", "", 1, 1, 1, classes=("nothing", "first"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    procedural_tasks.write_scenes(folder, "test", seed=1, count=6)
    procedural_tasks.write_hearts(folder, "test", seed=1, count=6)
    return folder


def names(root):
    return {
        "boxes": f"voc:{root}/scenes:test",
        "masks": f"coco:{root}/scenes/instances_test.json:{root}/scenes/JPEGImages",
        "keypoints": f"coco:{root}/hearts/keypoints_test.json:{root}/hearts/test",
    }


def perfect(record):
    """The truth as a prediction, its last object with a score too low to be shown."""
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
    settings = Settings(Path("."), tmp_path, "native")
    folder = settings.folder(run)
    folder.write_record({"state": "finished"})
    (folder.path / "config.yaml").write_text(json.dumps({"DATASETS": {"TEST": [dataset_name]}}))
    save_predictions(str(folder.path), dataset_name, predictions)
    return run, settings


def pixels(sample):
    data = base64.b64decode(sample.uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


@pytest.mark.parametrize("task", ["boxes", "masks", "keypoints"])
def test_truth_and_rows_side_by_side(root, tmp_path, task):
    name = names(root)[task]
    records = get_dataset(name).records()
    run, settings = finished(tmp_path, name, [perfect(record) for record in records])
    images = samples.samples(EXPERIMENT, [run], settings)
    assert len(images) == samples.IMAGES
    assert [s.image_id for s in (images[0][0], images[-1][0])] == [
        str(records[0]["image_id"]),
        str(records[-1]["image_id"]),
    ]
    for truth, found in images:
        assert (truth.row, found.row) == (None, "moco")
        assert pixels(truth).shape == pixels(found).shape == (256, 256, 3)  # 128 pixels, enlarged
        assert np.abs(pixels(truth) - pixels(found)).max() > 50  # an object is not shown


def test_label_maps_under_the_experiments_own_names(root, tmp_path, monkeypatch):
    name = f"voc_sem_seg:{root}/scenes:test"
    records = get_dataset(name).records()
    run, settings = finished(
        tmp_path, name, [{"image_id": r["image_id"], "sem_seg": []} for r in records]
    )
    used = []
    draw = samples.visualize.draw_labels
    monkeypatch.setattr(
        samples.visualize,
        "draw_labels",
        lambda image, labels, classes: used.append(tuple(classes)) or draw(image, labels, classes),
    )
    images = samples.samples(EXPERIMENT, [run], settings)
    assert {classes[:3] for classes in used} == {("nothing", "first", "bicycle")}
    truth, found = images[0]
    assert np.abs(pixels(truth) - pixels(found)).max() > 50


def test_nothing_is_shown_of_what_is_not_finished(tmp_path):
    run = Run(EXPERIMENT, "moco", 1, Path("c.yaml"), ())
    assert samples.samples(EXPERIMENT, [run], Settings(Path("."), tmp_path, "native")) == []
