"""Predictions to metrics: one call for every data set, one table for every metric.

What scores predictions belongs here, a module for each data set's rules (those of LVIS and
Cityscapes, which their own tools compute, are in `official.py`); neither engine is imported.
Reading annotations is `moco_det.datasets`' work. Start with `evaluate` below, and with
`predictions.py` for what an engine hands over.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

from tabulate import tabulate

from moco_det.common.errors import UserError
from moco_det.datasets import Dataset
from moco_det.evaluation.coco import evaluate_coco
from moco_det.evaluation.densepose import evaluate_densepose
from moco_det.evaluation.official import evaluate_cityscapes, evaluate_lvis
from moco_det.evaluation.predictions import checked
from moco_det.evaluation.semantic import evaluate_semantic
from moco_det.evaluation.voc import evaluate_voc

Results = dict[str, dict[str, float]]  # task -> metric -> percent

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
            {"image_id", "sem_seg"}; see `moco_det.evaluation.semantic`.
        keypoint_sigmas: TEST.KEYPOINT_OKS_SIGMAS; () for COCO's persons.
        only: the images that count; None for all of the data set.

    Returns:
        {"bbox": {"AP", "AP50", "AP75", ..., "AP-<class>", ...}, "segm": ..., "keypoints": ...,
        "densepose_gps": ..., "densepose_gpsm": ..., "densepose_segm": ...}, the tasks that the
        predictions have and the data set scores; or {"sem_seg": {"mIoU", ...}}. In percent. A
        metric without ground truth is NaN and takes no part in means.

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
