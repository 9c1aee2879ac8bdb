"""Sample predictions of every task: test images with the truth, and with what each row found."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image

from moco_det import visualize
from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.job import FINISHED
from moco_det.benchmark.jobs.runs import Settings
from moco_det.datasets import Dataset, Record, get_dataset, read_labels
from moco_det.evaluation.predictions import predictions_file

IMAGES = 4  # of an experiment
SCORE_SHOWN = 0.3  # detections below this score are left out
SIDE = 320  # pixels of the longer side in the report
SMALLEST = 256  # images with a shorter longer side are enlarged before boxes are drawn on them


@dataclass(frozen=True)
class Sample:
    """One picture: a JPEG as a data URI, and the row whose run it shows; None: the truth."""

    image_id: str
    row: str | None
    uri: str


def samples(experiment: Experiment, runs: Sequence[Run], settings: Settings) -> list[list[Sample]]:
    """For each of `IMAGES` test images at even distances the truth and each row's first trial.

    Empty where no run of the experiment is finished.

    Raises:
        UserError: the test images are no longer there.
    """
    folders: dict[str, Path] = {}
    for run in runs:
        folder = settings.folder(run)
        if run.experiment == experiment and run.row not in folders and folder.state() == FINISHED:
            folders[run.row] = folder.path
    if not folders:
        return []
    config = yaml.safe_load((next(iter(folders.values())) / "config.yaml").read_text())
    dataset = get_dataset(config["DATASETS"]["TEST"][0])
    records = dataset.records()
    chosen = np.unique(np.linspace(0, len(records) - 1, IMAGES).round().astype(int))
    found = {row: _predictions(path, dataset) for row, path in folders.items()}
    names = (*experiment.classes, *dataset.classes[len(experiment.classes) :])
    return [_pictures(records[i], dataset, found, names) for i in chosen]


def _predictions(folder: Path, dataset: Dataset) -> dict[str, Any]:
    content = json.loads(predictions_file(folder, dataset.name).read_text())
    return {str(prediction["image_id"]): prediction for prediction in content}


def _pictures(
    record: Record, dataset: Dataset, found: Mapping[str, Mapping], names: Sequence[str]
) -> list[Sample]:
    image, image_id = visualize.read_photograph(record), str(record["image_id"])
    pictures = {None: _truth(image, record, dataset, names)}
    for row, predictions in found.items():
        pictures[row] = image
        if image_id in predictions:
            pictures[row] = _predicted(image, predictions[image_id], dataset, names)
    return [Sample(image_id, row, data_uri(picture)) for row, picture in pictures.items()]


def _truth(image: Tensor, record: Record, dataset: Dataset, names: Sequence[str]) -> Tensor:
    if dataset.evaluator == "sem_seg":
        return _with_labels(image, read_labels(record, len(dataset.classes)), names)
    return _with_objects(image, visualize.annotated_objects(record, names), dataset)


def _predicted(image: Tensor, prediction: Mapping, dataset: Dataset, names: Sequence[str]):
    size = tuple(image.shape[1:])
    if dataset.evaluator == "sem_seg":
        return _with_labels(image, visualize.predicted_labels(prediction, size), names)
    objects = visualize.predicted_objects(prediction, size, names, SCORE_SHOWN)
    return _with_objects(image, objects, dataset)


def _with_labels(image: Tensor, labels: np.ndarray, names: Sequence[str]) -> Tensor:
    factor = _factor(image)
    large = labels.repeat(factor, axis=0).repeat(factor, axis=1)
    return visualize.draw_labels(_enlarged(image, factor), large, names)


def _with_objects(image: Tensor, objects: visualize.Objects, dataset: Dataset) -> Tensor:
    factor = _factor(image)
    if objects.masks is not None:
        masks = objects.masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        objects = replace(objects, masks=masks)
    if objects.keypoints is not None:
        objects = replace(objects, keypoints=objects.keypoints * factor)
    objects = replace(objects, boxes=objects.boxes * factor)
    return visualize.draw_objects(_enlarged(image, factor), objects, visualize.skeleton_of(dataset))


def _factor(image: Tensor) -> int:
    return max(1, round(SMALLEST / max(image.shape[1:])))


def _enlarged(image: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return image
    large = interpolate(image[None].float(), scale_factor=factor, mode="bicubic")[0]
    return large.round().clamp(0, 255).to(torch.uint8)


def data_uri(picture: Tensor) -> str:
    """A JPEG of at most `SIDE` pixels a side."""
    image, file = to_pil_image(picture), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
