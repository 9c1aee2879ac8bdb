"""PASCAL VOC's average precision, by the rules of the development kit.

Detections of a class are visited in order of descending score. Each looks at the object of its
class with which it overlaps most, whether or not an earlier detection has taken it: above the
threshold, the first detection of an object is right and every later one is wrong; a detection of a
difficult object counts neither way. Precision is averaged over recall, at eleven points (VOC 2007)
or as the area under the curve (later years).

As in Detectron2's PascalVOCDetectionEvaluator: the overlap must exceed the threshold (the kit's
MATLAB code also accepts equality), and AP is the mean over thresholds .50:.05:.95. VOC's inclusive
pixels, where a width is xmax - xmin + 1, are the continuous boxes of `Dataset.records`, so the
overlap is the plain IoU.

Also as in Detectron2, boxes are rounded to one decimal and scores to three, as its text files are.
VOC does not ask for it, but it makes many scores equal, and moved AP by up to 0.16 in a trial
on BCCD; without it the numbers would not be comparable with published ones. Among equal scores,
Detectron2 leaves the order to an unstable sort; here it is the order of the data set.

Unlike Detectron2, a class without an object to find has AP NaN and takes no part in the means
(there: 0 at eleven points; NaN for all classes otherwise).
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from moco_det.datasets import Record, VocDataset
from moco_det.evaluation.predictions import check_images

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))


@dataclass
class _Matches:
    """D detections over all images, in the images' order, and the G objects.

    `best_iou` (D,) and `best_object` (D,): the overlap with, and index of, the object of the same
    class and image that is overlapped most; overlap 0 and any index where there is none.
    """

    score: np.ndarray  # (D,)
    label: np.ndarray  # (D,)
    best_iou: np.ndarray  # (D,)
    best_object: np.ndarray  # (D,)
    object_label: np.ndarray  # (G,)
    difficult: np.ndarray  # (G,) bool


def evaluate_voc(
    dataset: VocDataset,
    predictions: list[dict[str, Any]],
    only: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """{"bbox": AP, AP50, AP75 and, per class, AP-<class> and AP50-<class>}, all in percent.

    `predictions` as checked by `moco_det.evaluation.evaluate`; `only`: the images that count, None
    for all.
    """
    records = [r for r in dataset.records() if only is None or r["image_id"] in only]
    matches = _match(records, predictions)
    labels = range(len(dataset.classes))
    table = np.stack([100 * _class_aps(matches, label, dataset.eleven_point) for label in labels])
    present = table[~np.isnan(table[:, 0])]
    mean = present.mean(0) if len(present) else np.full(len(THRESHOLDS), np.nan)
    results = {
        "AP": mean.mean(),
        "AP50": mean[THRESHOLDS.index(0.5)],
        "AP75": mean[THRESHOLDS.index(0.75)],
    }
    results |= {f"AP-{name}": row.mean() for name, row in zip(dataset.classes, table, strict=True)}
    results |= {f"AP50-{name}": row[0] for name, row in zip(dataset.classes, table, strict=True)}
    return {"bbox": {metric: float(value) for metric, value in results.items()}}


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven_point: bool) -> float:
    """AP of one ranked list, from recall and precision (D,) after each of its detections."""
    if eleven_point:
        # arange, not linspace: the kit's 0.3 is 3 * 0.1, a hair above 3 / 10, and decides ties.
        levels = np.arange(0, 1.1, 0.1)
        return float(np.mean([precision[recall >= level].max(initial=0) for level in levels]))
    steps = np.diff(recall, prepend=0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # best precision at this recall or more
    return float((steps * envelope).sum())


def _match(records: list[Record], predictions: list[dict[str, Any]]) -> _Matches:
    prediction_of = {prediction["image_id"]: prediction for prediction in predictions}
    check_images(predictions, [record["image_id"] for record in records])
    empty = (np.empty(0), np.empty(0, int), np.empty(0), np.empty(0, int))
    detections = [empty]
    object_label, difficult = [], []
    for record in records:
        annotations = record["annotations"]
        labels = np.array([annotation["category_id"] for annotation in annotations], int)
        if record["image_id"] in prediction_of:
            prediction = prediction_of[record["image_id"]]
            iou, index = _best_overlap(prediction, annotations, labels)
            score, label = prediction["scores"].numpy().round(3), prediction["classes"].numpy()
            detections.append((score, label, iou, index + len(object_label)))
        object_label.extend(labels)
        difficult.extend(annotation["difficult"] for annotation in annotations)
    columns = [np.concatenate(column) for column in zip(*detections, strict=True)]
    return _Matches(*columns, np.array(object_label, int), np.array(difficult, bool))


def _best_overlap(
    prediction: dict[str, Any], annotations: list[dict], labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For the N detections of an image: the best IoU (N,) and the annotation's index (N,)."""
    count = len(prediction["boxes"])
    if not annotations:
        return np.zeros(count), np.zeros(count, int)
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64)
    iou = box_iou(prediction["boxes"].round(decimals=1), boxes).numpy()
    iou[prediction["classes"].numpy()[:, None] != labels] = 0
    return iou.max(1), iou.argmax(1)


def _class_aps(matches: _Matches, label: int, eleven_point: bool) -> np.ndarray:
    """AP of one class at each of `THRESHOLDS`; NaN where it has no object to find."""
    positives = np.count_nonzero((matches.object_label == label) & ~matches.difficult)
    if not positives:
        return np.full(len(THRESHOLDS), np.nan)
    mine = np.flatnonzero(matches.label == label)
    ranked = mine[np.argsort(-matches.score[mine], kind="stable")]
    iou, objects = matches.best_iou[ranked], matches.best_object[ranked]
    aps = []
    for threshold in THRESHOLDS:
        right = _is_right(iou, objects, matches.difficult, threshold)
        found = np.cumsum(right)
        precision = found / np.arange(1, len(right) + 1)
        aps.append(average_precision(found / positives, precision, eleven_point))
    return np.array(aps)


def _is_right(
    iou: np.ndarray, objects: np.ndarray, difficult: np.ndarray, threshold: float
) -> np.ndarray:
    """Whether each ranked detection that counts is right (bool); those that do not are left out."""
    hits = np.flatnonzero(iou > threshold)
    _, first = np.unique(objects[hits], return_index=True)
    right = np.zeros(len(iou), bool)
    right[hits[first]] = True
    ignored = np.zeros(len(iou), bool)
    ignored[hits] = difficult[objects[hits]]
    return right[~ignored]
