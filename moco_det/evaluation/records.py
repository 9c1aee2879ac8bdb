"""What both engines end in: predictions on disk, and results held against what was expected."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from moco_det.errors import UserError
from moco_det.iuv import encode_iuv


def prediction_record(image_id: int | str, output: dict[str, Tensor]) -> dict[str, Any]:
    """What a model found in one image, as it is saved and evaluated, on the CPU.

    Args:
        image_id: of the data set's record.
        output: {"boxes" (D, 4), "scores" (D,), "classes" (D,)}, and "masks" bool (D, H, W) in the
            original image, "keypoints" (D, K, 3) and "densepose", D of uint8 (3, h, w) in whole
            pixels of the boxes, where the model has them; or, of semantic segmentation, {"sem_seg"
            (C, H, W)}, the classes' scores.

    Returns:
        The same boxes, scores and classes; "segmentations", D compressed RLEs whose "counts" are
        strings, as JSON needs them; "keypoints"; "densepose", D of `encode_iuv`. Of semantic
        segmentation {"image_id", "sem_seg"}, one {"category_id", "segmentation"} for each class
        that is the best of some pixel.
    """
    if "sem_seg" in output:
        best = output["sem_seg"].argmax(dim=0)
        present = best.unique()
        shapes = encode_masks(best == present[:, None, None])
        segments = zip(present.tolist(), shapes, strict=True)
        found = [{"category_id": label, "segmentation": shape} for label, shape in segments]
        return {"image_id": image_id, "sem_seg": found}
    record = {"image_id": image_id}
    # Cloned: Detectron2's evaluator moves the keypoints where they lie.
    for key in ("boxes", "scores", "classes", "keypoints"):
        if key in output:
            record[key] = output[key].detach().cpu().clone()
    if "masks" in output:
        record["segmentations"] = encode_masks(output["masks"])
    if "densepose" in output:
        record["densepose"] = [encode_iuv(surface.cpu().numpy()) for surface in output["densepose"]]
    return record


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Bool masks (D, H, W) to D compressed RLEs {"size": [H, W], "counts": str}."""
    shapes = []
    for mask in masks:
        shape = coco_mask.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))
        shapes.append({**shape, "counts": shape["counts"].decode("ascii")})
    return shapes


def predictions_file(output_dir: str | Path, name: str) -> Path:
    """Where the predictions on data set `name` are: OUTPUT_DIR/inference/<name>.json.

    A folder named as a data set becomes a file name by `_` for all but letters, digits and `-`.
    """
    return Path(output_dir) / "inference" / f"{re.sub(r'[^A-Za-z0-9-]+', '_', name)}.json"


def save_predictions(output_dir: str, name: str, predictions: list[dict]) -> None:
    """Write the predictions on data set `name` to `predictions_file`, as a list.

    Raises:
        UserError: the file cannot be written.
    """
    path = predictions_file(output_dir, name)
    plain = [
        {key: value.tolist() if torch.is_tensor(value) else value for key, value in found.items()}
        for found in predictions
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain))
    except OSError as error:
        raise UserError(f"cannot write detections to {path}: {error.strerror}") from error


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
