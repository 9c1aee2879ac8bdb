"""What the steps of a quickstart left on disk, as the report's dict and pictures."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from moco_det.benchmark.jobs.job import Command, environment
from moco_det.benchmark.jobs.runs import RunFolder
from moco_det.benchmark.report import gallery
from moco_det.benchmark.report.quickstart_page import Pair
from moco_det.common.errors import UserError
from moco_det.datasets import get_dataset

PICTURES = 8


def collect(plan, steps: Sequence[Command], durations: Sequence[float]) -> dict:
    """The dict that `report.write_report` takes, less "seconds", from the files of a finished run.

    Args:
        plan: a `quickstart.Plan`.
        steps, durations: what was run, and the seconds that each step took.

    Raises:
        UserError: a file lacks a number that it should hold.
    """
    folders: dict[str, list[RunFolder]] = {}
    for run in plan.runs():
        folders.setdefault(run.row, []).append(plan.settings.folder(run))
    return {
        "title": "From unlabelled images to a detection AP",
        "created": datetime.now().strftime("%-d %B %Y, %H:%M"),
        "data": _data(plan),
        "pretraining": read_pretraining(plan.pretrain_folder / "metrics.jsonl"),
        "detection": [
            {"seed": seed, "random": read_ap(random), "moco": read_ap(moco)}
            for seed, random, moco in zip(
                plan.detector_seeds, folders["random"], folders["moco"], strict=True
            )
        ],
        "detection_loss": {
            start: [folder.losses() for folder in each] for start, each in folders.items()
        },
        "steps": [
            {"name": step.name, "command": step.as_typed(), "seconds": round(seconds, 1)}
            for step, seconds in zip(steps, durations, strict=True)
        ]
        + [_step(folder) for each in folders.values() for folder in each],
        "environment": environment(plan.repository),
        "settings": {path.name: path.read_text() for path in (plan.recipe, plan.config_file)},
    }


def read_pretraining(path: Path) -> dict:
    """Loss and kNN curves over epochs from pretraining's metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    return {
        "loss": [[line["epoch"], line["loss"]] for line in training],
        "chance_loss": training[-1]["chance_loss"],
        "knn": [[line["epoch"], line["knn_top1"]] for line in lines if "knn_top1" in line],
    }


def read_ap(folder: RunFolder) -> dict[str, float]:
    """{AP, AP50, AP75} in percent of a detector's last evaluation."""
    results = folder.results()
    try:
        return {name: results[f"bbox/{name}"] for name in ("AP", "AP50", "AP75")}
    except KeyError as error:
        path = folder.path / "metrics.json"
        raise UserError(f"{path} holds no {error}: the detector was not evaluated") from error


def _step(folder: RunFolder) -> dict[str, object]:
    record = folder.record
    name = f"fine-tune from {folder.run.row}, seed {folder.run.trial}"
    return {"name": name, "command": record["command"], "seconds": record["seconds"]}


def read_predictions(folder: Path) -> dict[str, gallery.Boxes]:
    """A detector's detections by image id, from the one file in its folder inference/."""
    files = sorted((folder / "inference").glob("*.json"))
    if len(files) != 1:
        raise UserError(f"{folder / 'inference'} should hold one .json file of detections")
    return {
        entry["image_id"]: gallery.Boxes(
            np.array(entry["boxes"], np.float32).reshape(-1, 4),
            np.array(entry["classes"], np.int64),
            np.array(entry["scores"], np.float32),
        )
        for entry in json.loads(files[0].read_text())
    }


def draw_pairs(plan) -> list[Pair]:
    """Pictures of the first seed's two detectors on test images at even distances."""
    dataset = get_dataset(plan.test)
    records = dataset.records()
    chosen = np.unique(np.linspace(0, len(records) - 1, PICTURES).round().astype(int))
    found = {
        run.row: read_predictions(plan.settings.folder(run).path)
        for run in plan.runs()
        if run.trial == plan.seed
    }
    return [draw_pair(records[i], found, dataset.classes) for i in chosen]


def draw_pair(record: dict, found: dict, classes: tuple[str, ...]) -> Pair:
    """One test image twice; `found` is {start: {image id: detections}}."""
    annotations = record["annotations"]
    truth = gallery.Boxes(
        np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4),
        np.array([a["category_id"] for a in annotations], np.int64),
    )
    drawn = {}
    for start, name in (("moco", "MoCo"), ("random", "Random")):
        detections = found[start][record["image_id"]]
        shown = gallery.confident(detections)
        drawn[f"{start}_words"] = gallery.in_words(shown, gallery.matched(shown, truth), truth)
        path = Path(record["file_name"])
        label = f"{name}, image {record['image_id']}"
        drawn[start] = gallery.picture(path, truth, detections, classes, label)
    return Pair(str(record["image_id"]), **drawn)


def _data(plan) -> dict[str, str]:
    train, test = (len(get_dataset(name).records()) for name in (plan.train, plan.test))
    drawn = f"drawn by procedural_images.py from seed {plan.seed}"
    return {
        "Unlabelled images": drawn if plan.embedded else str(plan.images),
        "Annotated images": drawn if plan.embedded else plan.train.split(":", 1)[1],
        "Detector trained on": f"{train} images",
        "Tested on": f"{test} images",
        "Classes": ", ".join(plan.classes),
    }
