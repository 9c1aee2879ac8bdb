"""Metrics of semantic segmentation, from one confusion matrix over all pixels of a data set.

Names and rules are those of Detectron2's SemSegEvaluator: pixels whose label is ignored count
nowhere, not even as false positives; a class that no pixel truly has is NaN and takes no part in
the means, even where it is predicted. (Cityscapes' script instead counts such a class as IoU 0. All
19 classes occur in its val set, so that there the two agree.)

Unlike there, a pixel for which nothing was predicted counts against the class that it has; here a
prediction may be incomplete. The boundary IoU that Detectron2 adds with OpenCV is left out.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.datasets.semantic import IGNORED, SemanticDataset, read_labels
from moco_det.evaluation.predictions import check_images


def evaluate_semantic(
    dataset: SemanticDataset,
    predictions: Sequence[dict[str, Any]],
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """See `semantic_metrics`.

    Args:
        predictions: at most one {"image_id", "sem_seg": [{"category_id", "segmentation"}, ...]} per
            image, with one compressed RLE in the original image for each class that was found.
        only: the images that count; None for all.

    Raises:
        ValueError: a prediction of an image that is not in the data set, or one that `label_map`
            refuses.
        UserError: a label map that cannot be read.
    """
    segments_of = {found["image_id"]: found["sem_seg"] for found in predictions}
    count = len(dataset.classes)
    confusion = np.zeros((count + 1, count + 1), dtype=np.int64)
    records = [r for r in dataset.records() if only is None or r["image_id"] in only]
    check_images(predictions, [record["image_id"] for record in records])
    for record in records:
        target = read_labels(record, count)
        try:
            found = label_map(segments_of.get(record["image_id"], ()), target.shape, count)
        except ValueError as error:
            raise ValueError(f"image {record['image_id']}: {error}") from error
        confusion += confusion_matrix(found, target, count)
    return semantic_metrics(confusion, dataset.classes)


def label_map(
    segments: Sequence[Mapping[str, Any]], size: tuple[int, int], num_classes: int
) -> np.ndarray:
    """Segments of one image to a label map (H, W) uint8, `IGNORED` where there is none.

    Raises:
        ValueError: a category outside [0, num_classes), a mask of another size, a pixel in two.
    """
    labels = np.full(size, IGNORED, dtype=np.uint8)
    for segment in segments:
        category, shape = segment["category_id"], segment["segmentation"]
        if not 0 <= category < num_classes:
            raise ValueError(f"category {category} is outside [0, {num_classes})")
        if tuple(shape["size"]) != tuple(size):
            raise ValueError(f"a mask is of size {shape['size']}, the image of {list(size)}")
        mask = coco_mask.decode(shape).astype(bool)
        if (labels[mask] != IGNORED).any():
            raise ValueError(f"the mask of category {category} overlaps another")
        labels[mask] = category
    return labels


def confusion_matrix(found: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by (found, true) class, (K + 1, K + 1); the last of each stands for `IGNORED`."""
    found, target = (
        np.minimum(x.reshape(-1), num_classes).astype(np.int64) for x in (found, target)
    )
    side = num_classes + 1
    return np.bincount(side * found + target, minlength=side * side).reshape(side, side)


def semantic_metrics(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """In percent, NaN where there is no pixel to judge by, from a `confusion_matrix`.

    mIoU: mean over the classes of intersection / union of the pixels found and true; fwIoU: the
    mean weighted by the true pixels; mACC: mean share of a class's pixels that are found; pACC:
    share of all pixels. Then IoU-<class> and ACC-<class>.
    """
    judged = confusion[:, :-1].astype(np.float64)  # without what is ignored
    right = judged.diagonal()
    true, found = judged.sum(axis=0), judged[:-1].sum(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a class without pixels
        iou = np.where(true > 0, right / (true + found - right), np.nan)
        accuracy = right / true
        share = true / true.sum()
        overall = right.sum() / true.sum()
    results = {
        "mIoU": _mean(iou),
        "fwIoU": np.nansum(iou * share) if true.any() else np.nan,
        "mACC": _mean(accuracy),
        "pACC": overall,
    }
    for prefix, values in (("IoU", iou), ("ACC", accuracy)):
        results |= {f"{prefix}-{name}": v for name, v in zip(classes, values, strict=True)}
    return {name: 100 * float(value) for name, value in results.items()}


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return known.mean() if len(known) else np.nan
