"""Predictions to metrics: one call for every data set, one table for every metric.

What scores predictions belongs here, a module for each data set's rules (those of LVIS and
Cityscapes, which their own tools compute, are in `official.py`); neither engine is imported.
Reading annotations is `moco_det.datasets`' work. Start with `evaluate` below, and with
`predictions.py` for what an engine hands over.
"""

import math
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tabulate import tabulate

from moco_det.common.errors import UserError
from moco_det.datasets import Dataset, MappedDataset, Record, read_depth, read_labels
from moco_det.datasets.dataset import evenly_spaced
from moco_det.datasets.depth import encode_depth
from moco_det.evaluation.coco import evaluate_coco
from moco_det.evaluation.densepose import evaluate_densepose, require_dense_pose
from moco_det.evaluation.depth import evaluate_depth
from moco_det.evaluation.official import evaluate_cityscapes, evaluate_lvis
from moco_det.evaluation.predictions import checked, encode_masks
from moco_det.evaluation.semantic import evaluate_semantic
from moco_det.evaluation.voc import evaluate_voc

Results = dict[str, dict[str, float]]  # task -> metric -> percent; of depth, metres

# of detections
_EVALUATORS = {
    "voc": evaluate_voc,
    "coco": evaluate_coco,
    "densepose": evaluate_densepose,
    "lvis": evaluate_lvis,
    "cityscapes": evaluate_cityscapes,
}


def evaluate(
    dataset: Dataset,
    predictions: Sequence[dict[str, Any]],
    keypoint_sigmas: Sequence[float] = (),
    only: Collection[int | str] | None = None,
) -> Results:
    """Score predictions with the metrics of the data set.

    Args:
        dataset: the one that they are predictions of.
        predictions: at most one per image, in any order; see `predictions.prediction_record`.
            {"image_id", "boxes" (N, 4) XYXY in pixels of the original image, "scores" (N,),
            "classes" (N,) contiguous} and, where the detector finds them, "segmentations", N
            compressed RLEs, "keypoints" (N, K, 3): x, y in continuous coordinates, score, and
            "densepose", N of `moco_det.densepose.points.encode_iuv`; arrays, lists or CPU tensors.
            An image without one counts as an image without detections. Of a semantic data set
            {"image_id", "sem_seg"}; see `moco_det.evaluation.semantic`. Of one with depth maps
            {"image_id", "depth"}; see `moco_det.evaluation.depth`.
        keypoint_sigmas: TEST.KEYPOINT_OKS_SIGMAS; () for COCO's persons.
        only: the images that count; None for all of the data set.

    Returns:
        {"bbox": {"AP", "AP50", "AP75", ..., "AP-<class>", ...}, "segm": ..., "keypoints": ...,
        "densepose_gps": ..., "densepose_gpsm": ..., "densepose_segm": ...}, the tasks that the
        predictions have and the data set scores; or {"sem_seg": {"mIoU", ...}}. In percent. Or
        {"depth": {"rmse"}}, in metres. A metric without ground truth is NaN and takes no part in
        means.

    Raises:
        ValueError: two predictions of one image, one of no image of the data set; lengths, classes
            or masks that do not fit.
        UserError: the ground truth does not have what is to be scored; the metric's package is
            missing.
    """
    seen = {prediction["image_id"] for prediction in predictions}
    if len(seen) < len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(seen)} images; one each is expected"
        )
    if dataset.evaluator == "sem_seg":
        return {"sem_seg": evaluate_semantic(dataset, predictions, only)}
    if dataset.evaluator == "depth":
        return {"depth": evaluate_depth(dataset, predictions, only)}
    detections = [checked(prediction, len(dataset.classes)) for prediction in predictions]
    if dataset.evaluator == "coco":
        return evaluate_coco(dataset, detections, keypoint_sigmas, only)
    return _EVALUATORS[dataset.evaluator](dataset, detections, only)


def print_table(results: Results) -> None:
    """Print each task's metrics, its AP or IoU per class, and Detectron2's lines to copy."""
    for task, metrics in results.items():
        summary = {name: value for name, value in metrics.items() if "-" not in name}
        print(f"Results for {task}:")
        print(tabulate([summary.values()], summary.keys(), tablefmt="pipe", floatfmt=".3f"))
        metric = "IoU" if task == "sem_seg" else "AP"
        prefix = f"{metric}-"
        rows = [(k.removeprefix(prefix), v) for k, v in metrics.items() if k.startswith(prefix)]
        if rows:
            count = min(3, len(rows))
            headers = ["category", metric] * count
            print(tabulate(_columns(rows, count), headers, "pipe", floatfmt=".3f"))
        print(f"copypaste: Task: {task}")
        print("copypaste: " + ",".join(summary))
        print("copypaste: " + ",".join(f"{value:.4f}" for value in summary.values()), flush=True)


def _columns(rows: list[tuple[str, float]], count: int) -> list[tuple]:
    """Lay (name, value) rows out side by side, `count` of them in a line."""
    return [sum(rows[i : i + count], ()) for i in range(0, len(rows), count)]


def verify_results(expected: list, results: dict) -> None:
    """Hold `results` against TEST.EXPECTED_RESULTS, entries [task, metric, value, tolerance].

    Raises:
        UserError: names every metric that is absent, not finite, or further off than allowed.
    """
    missed = []
    for task, metric, value, tolerance in expected:
        actual = results.get(task, {}).get(metric, math.nan)
        if not abs(actual - value) <= tolerance:
            missed.append(f"{task}/{metric} is {actual:.4g}, expected {value} +- {tolerance}")
    if missed:
        raise UserError(f"TEST.EXPECTED_RESULTS missed: {'; '.join(missed)}")
    if expected:
        print("TEST.EXPECTED_RESULTS met", flush=True)


# -- tried before the first iteration --------------------------------------------------------------

REHEARSED = 8  # images of a data set


def rehearse(
    dataset: Dataset,
    records: Sequence[Record],
    masks: bool = False,
    keypoints: int = 0,
    keypoint_sigmas: Sequence[float] = (),
    dense_pose: bool = False,
) -> None:
    """Score a few images with nothing, and with their own annotations.

    The files of the body that dense pose is scored with are large, and not read.

    Args:
        records: of `dataset`.
        masks, keypoints, dense_pose: what the model will predict; of keypoints, how many.
        keypoint_sigmas: TEST.KEYPOINT_OKS_SIGMAS.

    Raises:
        UserError: it cannot be scored; the metric's package is missing.
    """
    if dense_pose:
        require_dense_pose((a for record in records for a in record["annotations"]), dataset)
    if isinstance(dataset, MappedDataset):
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(lambda record: dataset.read_map(record).shape, records):
                pass
    annotated = [record for record in records if record.get("annotations", True)]
    chosen = evenly_spaced(annotated or records, REHEARSED)
    for make in (_nothing, _annotated):
        predictions = [make(record, dataset, masks, keypoints) for record in chosen]
        try:
            evaluate(dataset, predictions, keypoint_sigmas, {r["image_id"] for r in chosen})
        except UserError:
            raise
        except Exception as error:  # the tools raise what they happen to stumble over
            raise UserError(
                f"dataset {dataset.name} cannot be scored: {type(error).__name__}: {error}"
            ) from error


def _nothing(record: Record, dataset: Dataset, masks: bool, keypoints: int) -> dict[str, Any]:
    if dataset.evaluator == "depth":
        size = record["height"], record["width"]
        return {"image_id": record["image_id"], "depth": encode_depth(np.zeros(size))}
    return _prediction(record | {"annotations": []}, masks, keypoints) | {"sem_seg": []}


def _annotated(record: Record, dataset: Dataset, masks: bool, keypoints: int) -> dict[str, Any]:
    if dataset.evaluator == "sem_seg":
        labels = read_labels(record, len(dataset.classes))
        present = [label for label in np.unique(labels).tolist() if label < len(dataset.classes)]
        shapes = encode_masks(torch.from_numpy(np.stack([labels == p for p in present])))
        segments = zip(present, shapes, strict=True)
        found = [{"category_id": label, "segmentation": shape} for label, shape in segments]
        return {"image_id": record["image_id"], "sem_seg": found}
    if dataset.evaluator == "depth":
        return {"image_id": record["image_id"], "depth": encode_depth(read_depth(record))}
    return _prediction(record, masks, keypoints)


def _prediction(record: Record, masks: bool, keypoints: int) -> dict[str, Any]:
    """The objects of a record as a detector would have found them, one surer than the next."""
    objects = record["annotations"]
    if masks:
        objects = [a for a in objects if a.get("segmentation")]
    found = {
        "image_id": record["image_id"],
        "boxes": [a["bbox"] for a in objects],
        "scores": [1 / (1 + place) for place in range(len(objects))],
        "classes": [a["category_id"] for a in objects],
    }
    if masks:
        size = record["height"], record["width"]
        found["segmentations"] = [_run_lengths(a["segmentation"], size) for a in objects]
    if keypoints:
        points = torch.zeros(len(objects), keypoints, 3)
        for row, annotation in zip(points, objects, strict=True):
            if len(annotation.get("keypoints", ())) == row.numel():
                row[:] = torch.tensor(annotation["keypoints"]).reshape(-1, 3)
        found["keypoints"] = points
    return found


def _run_lengths(shape: list | dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(shape, dict):
        return shape
    return coco_mask.merge(coco_mask.frPyObjects(shape, *size))
