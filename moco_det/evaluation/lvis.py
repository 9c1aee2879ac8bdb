"""LVIS's box and mask metrics, computed by the official tool (the package `lvis`)."""

import logging
from types import ModuleType
from typing import Any

from moco_det.common.errors import import_optional
from moco_det.datasets import LvisDataset
from moco_det.evaluation.coco import as_results
from moco_det.evaluation.official import old_numpy
from moco_det.evaluation.predictions import check_images, check_mask_sizes, tasks_of

DETECTIONS_PER_IMAGE = 300  # LVIS's rule, where COCO has 100
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def evaluate_lvis(
    dataset: LvisDataset, predictions: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """For each task of the predictions, "bbox" and "segm", LVIS's nine precisions in percent.

    APr, APc and APf are of the classes in under 10, 10 to 99, and 100 or more training images. NaN
    where there is no ground truth (Detectron2: -100); no detections at all is AP 0 (there: NaN). A
    detection counts in an image only if its class is known to be there or not to be there; one that
    matches nothing is passed over where the class is not annotated exhaustively. Keypoints, which
    LVIS does not have, are not scored.

    Args:
        dataset: whose annotation file is the ground truth; all its images count.
        predictions: as checked by `moco_det.evaluation.evaluate`.

    Raises:
        UserError: the package `lvis` is not installed.
        ValueError: predictions for other images.
    """
    tool = _tool()
    ground_truth = tool.LVIS(str(dataset.json_file))
    check_images(predictions, ground_truth.imgs)
    sizes = {i: (image["height"], image["width"]) for i, image in ground_truth.imgs.items()}
    check_mask_sizes(predictions, sizes)
    tasks = [task for task in tasks_of(predictions) if task in ("bbox", "segm")]
    return {task: _metrics(tool, ground_truth, dataset, predictions, task) for task in tasks}


def _tool() -> ModuleType:
    """The package `lvis`, kept from setting up logging for the whole program as it is imported."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    tool = import_optional("lvis", "this data set's metric", "lvis")
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("lvis").setLevel(logging.ERROR)  # it warns of results given as a list
    return tool


def _metrics(
    tool: ModuleType,
    ground_truth,
    dataset: LvisDataset,
    predictions: list[dict[str, Any]],
    task: str,
) -> dict[str, float]:
    results = [r for p in predictions for r in as_results(p, dataset.category_ids, task)]
    found = tool.LVISResults(
        ground_truth, results or [_nothing(ground_truth)], DETECTIONS_PER_IMAGE
    )
    run = tool.LVISEval(ground_truth, found, task)
    with old_numpy(tool.eval):
        run.run()
    return {name: _percent(run.results[name]) for name in _METRICS}


def _nothing(ground_truth) -> dict[str, Any]:
    """The tool fails on an empty list, and passes over a detection of a category that is none."""
    image_id = next(iter(ground_truth.imgs))
    return {"image_id": image_id, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 0.0}


def _percent(value: float) -> float:
    """The tool marks a metric without ground truth with -1."""
    return float(100 * value) if value >= 0 else float("nan")
