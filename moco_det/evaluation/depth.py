"""The error of predicted depths: one root of a mean square over all pixels of a data set.

So it is in the evaluation of arXiv:2106.05967's authors (their multi-task benchmark), where others
average the roots of the images: pixels without a depth count nowhere, every other one counts the
same, and depths are at the size of the original image. Those predicted are in whole millimetres
from 0 to 65.535 m; an image without a prediction counts as 0 m everywhere.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from moco_det.datasets.depth import DepthDataset, decode_depth, read_depth
from moco_det.evaluation.predictions import check_images


def evaluate_depth(
    dataset: DepthDataset,
    predictions: Sequence[dict[str, Any]],
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """{"rmse": metres}; smaller is better, NaN where no pixel has a depth.

    Args:
        predictions: at most one {"image_id", "depth"} per image; see `datasets.depth.encode_depth`.
        only: the images that count; None for all.

    Raises:
        ValueError: a prediction of an image that is not in the data set, broken or of another size.
        UserError: a depth map that cannot be read.
    """
    depths_of = {found["image_id"]: found["depth"] for found in predictions}
    records = [r for r in dataset.records() if only is None or r["image_id"] in only]
    check_images(predictions, [record["image_id"] for record in records])
    squares, count = 0.0, 0
    for record in records:
        measured = read_depth(record)
        packed = depths_of.get(record["image_id"])
        try:
            found = np.zeros_like(measured) if packed is None else decode_depth(packed)
            sum_of_image, pixels = squared_distance(found, measured)
        except ValueError as error:
            raise ValueError(f"image {record['image_id']}: {error}") from error
        squares, count = squares + sum_of_image, count + pixels
    return {"rmse": math.sqrt(squares / count) if count else math.nan}


def squared_distance(found: np.ndarray, measured: np.ndarray) -> tuple[float, int]:
    """Sum of (found - measured)^2 over the pixels (H, W) that have a depth, and their number.

    Raises:
        ValueError: the two are of different sizes.
    """
    if found.shape != measured.shape:
        raise ValueError(f"depths are of size {list(found.shape)}, not {list(measured.shape)}")
    known = measured > 0
    distance = found[known].astype(np.float64) - measured[known]
    return float(distance @ distance), int(known.sum())
