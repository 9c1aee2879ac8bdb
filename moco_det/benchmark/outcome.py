"""What the steps of a quickstart left on disk, as the report's dict and pictures."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from moco_det.benchmark import gallery
from moco_det.benchmark.report import Pair
from moco_det.benchmark.steps import Step
from moco_det.datasets import get_dataset
from moco_det.errors import UserError

PICTURES = 8
PACKAGES = ("torch", "torchvision", "numpy", "fvcore", "pycocotools")


def collect(plan, steps: Sequence[Step], durations: Sequence[float]) -> dict:
    """The dict that `report.write_report` takes, less "seconds", from the files of a finished run.

    Args:
        plan: a `quickstart.Plan`.
        steps, durations: what was run, and the seconds that each step took.

    Raises:
        UserError: a file lacks a number that it should hold.
    """
    folders = {
        start: [plan.detector_folder(start, seed) for seed in plan.detector_seeds]
        for start in ("random", "moco")
    }
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
            start: [read_loss(folder) for folder in each] for start, each in folders.items()
        },
        "steps": [
            {"name": step.name, "command": step.as_typed(), "seconds": round(seconds, 1)}
            for step, seconds in zip(steps, durations, strict=True)
        ],
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


def _detector_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def read_ap(folder: Path) -> dict[str, float]:
    """{AP, AP50, AP75} in percent of a detector's last evaluation."""
    for line in reversed(_detector_lines(folder)):
        if "bbox/AP50" in line:
            return {name: line[f"bbox/{name}"] for name in ("AP", "AP50", "AP75")}
    raise UserError(f"{folder / 'metrics.json'} holds no bbox/AP50: the detector was not evaluated")


def read_loss(folder: Path) -> list[list[float]]:
    """[[iteration, total loss]], iterations counted from 1."""
    return [
        [line["iteration"] + 1, line["total_loss"]]
        for line in _detector_lines(folder)
        if "total_loss" in line
    ]


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
        start: read_predictions(plan.detector_folder(start, plan.seed))
        for start in ("moco", "random")
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


def environment(repository: Path) -> dict[str, str]:
    """Machine, commit and versions, for people to read."""
    gpus = torch.cuda.device_count()
    accelerator = f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "none"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "Processor": f"{_processor()}, {cores} cores",
        "GPU": accelerator,
        "System": platform.platform(),
        "Commit": _commit(repository),
        "Python": platform.python_version(),
    } | {name: metadata.version(name) for name in PACKAGES}


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(repository: Path) -> str:
    """The commit, with "-dirty" where files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
