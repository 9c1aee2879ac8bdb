"""Scoring, tried on the data before the first iteration, so that it does not fail after the last.

A few images are scored twice: with no predictions, and with their own annotations as predictions.
That all other annotations are of the form that the metrics need, their readers see to.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets import Dataset, Record, read_labels
from moco_det.datasets.image_files import evenly_spaced
from moco_det.evaluation import evaluate
from moco_det.evaluation.densepose import require_dense_pose
from moco_det.evaluation.predictions import encode_masks

IMAGES = 8  # that are scored


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
    if dataset.evaluator == "sem_seg":
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            for _ in threads.map(lambda r: read_labels(r, len(dataset.classes)).shape, records):
                pass
    annotated = [record for record in records if record.get("annotations", True)]
    chosen = evenly_spaced(annotated or records, IMAGES)
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
    return _prediction(record | {"annotations": []}, masks, keypoints) | {"sem_seg": []}


def _annotated(record: Record, dataset: Dataset, masks: bool, keypoints: int) -> dict[str, Any]:
    if dataset.evaluator == "sem_seg":
        labels = read_labels(record, len(dataset.classes))
        present = [label for label in np.unique(labels).tolist() if label < len(dataset.classes)]
        shapes = encode_masks(torch.from_numpy(np.stack([labels == p for p in present])))
        segments = zip(present, shapes, strict=True)
        found = [{"category_id": label, "segmentation": shape} for label, shape in segments]
        return {"image_id": record["image_id"], "sem_seg": found}
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
