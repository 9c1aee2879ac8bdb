"""Predictions to metrics: one call for every data set, one table for every metric."""

from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

from moco_det.datasets import Dataset
from moco_det.evaluation.coco import evaluate_coco
from moco_det.evaluation.voc import evaluate_voc

Results = dict[str, dict[str, float]]  # task -> metric -> percent

_EVALUATORS = {"voc": evaluate_voc, "coco": evaluate_coco}


def evaluate(dataset: Dataset, predictions: Sequence[dict[str, Any]]) -> Results:
    """Score detections with the metric of the data set.

    `predictions`: at most one dict per image, in any order, {"image_id", "boxes" (N, 4) XYXY in
    pixels of the original image, "scores" (N,), "classes" (N,) contiguous}, arrays or CPU tensors.
    An image without one counts as an image without detections.

    Returns {"bbox": {"AP", "AP50", "AP75", ..., "AP-<class>", ...}} in percent. A metric without
    ground truth is NaN and takes no part in means. Raises `ValueError` for two predictions of one
    image, and for lengths or classes that do not fit.
    """
    checked = [_checked(prediction, len(dataset.classes)) for prediction in predictions]
    seen = {prediction["image_id"] for prediction in checked}
    if len(seen) < len(checked):
        raise ValueError(f"{len(checked)} predictions for {len(seen)} images; one each is expected")
    return {"bbox": _EVALUATORS[dataset.evaluator](dataset, checked)}


def _checked(prediction: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """The same prediction as float64 and int64 tensors of fitting shapes."""
    boxes = torch.as_tensor(prediction["boxes"], dtype=torch.float64).reshape(-1, 4)
    scores = torch.as_tensor(prediction["scores"], dtype=torch.float64)
    classes = torch.as_tensor(prediction["classes"], dtype=torch.int64)
    image_id = prediction["image_id"]
    if not len(boxes) == len(scores) == len(classes):
        lengths = f"{len(boxes)} boxes, {len(scores)} scores, {len(classes)} classes"
        raise ValueError(f"image {image_id}: {lengths}")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ValueError(f"image {image_id}: a class is outside [0, {num_classes})")
    return {"image_id": image_id, "boxes": boxes, "scores": scores, "classes": classes}


def print_table(results: Results) -> None:
    """Print each task's metrics, its per-class AP, and Detectron2's lines for a spreadsheet."""
    for task, metrics in results.items():
        summary = {name: value for name, value in metrics.items() if "-" not in name}
        print(f"Results for {task}:")
        print(tabulate([summary.values()], summary.keys(), tablefmt="pipe", floatfmt=".3f"))
        prefix = "AP-"
        rows = [(k[len(prefix) :], v) for k, v in metrics.items() if k.startswith(prefix)]
        if rows:
            count = min(3, len(rows))
            headers = ["category", "AP"] * count
            print(tabulate(_columns(rows, count), headers, "pipe", floatfmt=".3f"))
        print(f"copypaste: Task: {task}")
        print("copypaste: " + ",".join(summary))
        print("copypaste: " + ",".join(f"{value:.4f}" for value in summary.values()), flush=True)


def _columns(rows: list[tuple[str, float]], count: int) -> list[tuple]:
    """Lay (name, value) rows out side by side, `count` of them in a line."""
    return [sum(rows[i : i + count], ()) for i in range(0, len(rows), count)]
