"""COCO's box, mask and keypoint metrics, computed by the official tool (pycocotools)."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_det.common.errors import UserError
from moco_det.common.images import image_size
from moco_det.datasets import CocoDataset, read_coco
from moco_det.evaluation.predictions import check_masks, tasks_of

# COCOeval.stats, in its order. Precision has Detectron2's names; AR1, AR10 and AR100 are recall
# with that many detections per image.
_DETECTION_METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
KEYPOINT_METRICS = (
    *("AP", "AP50", "AP75", "APm", "APl"),
    *("AR", "AR50", "AR75", "ARm", "ARl"),
)


def evaluate_coco(
    dataset: CocoDataset, predictions: list[dict[str, Any]], keypoint_sigmas: Sequence[float] = ()
) -> dict[str, dict[str, float]]:
    """For each task of the predictions COCO's metrics, then AP-<class>, in percent.

    Twelve for boxes ("bbox") and masks ("segm"), ten for keypoints; NaN where there is no ground
    truth. As in Detectron2:

    - all images of the annotation file count;
    - small, medium and large are told by the annotation's "area", and for a detection that matches
      none by the area of its box or its mask; for keypoints by that of its box, too, where the tool
      left to itself takes the box around the keypoints;
    - keypoints move back by 0.5, from continuous coordinates to the file's pixel indices.

    Unlike there, no detections at all is AP 0, not NaN.

    Args:
        dataset: whose annotation file is the ground truth.
        predictions: as checked by `moco_det.evaluation.evaluate`.
        keypoint_sigmas: of the object keypoint similarity, one per keypoint; () for those of COCO's
            17 keypoints of a person.

    Raises:
        UserError: the ground truth has no masks or keypoints, or another number of keypoints.
        ValueError: predictions for other images.
    """
    tasks = tasks_of(predictions)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = load_ground_truth(dataset)
        check_masks(predictions, image_sizes(ground_truth))
        if "segm" in tasks:
            _require_masks(ground_truth, dataset)
        if "keypoints" in tasks:
            _require_keypoints(ground_truth, dataset)
        return {
            task: _metrics(ground_truth, dataset, predictions, task, keypoint_sigmas)
            for task in tasks
        }


def _metrics(
    ground_truth: COCO, dataset: CocoDataset, predictions: list[dict[str, Any]], task: str, sigmas
) -> dict[str, float]:
    results = [
        result
        for prediction in predictions
        for result in as_results(prediction, dataset.category_ids, task)
    ]
    run = COCOeval(ground_truth, load_results(ground_truth, results), iouType=task)
    if task == "keypoints":
        if sigmas:
            run.params.kpt_oks_sigmas = np.array(sigmas, dtype=np.float64)
        _check_keypoint_counts(ground_truth, dataset, predictions, len(run.params.kpt_oks_sigmas))
    names = KEYPOINT_METRICS if task == "keypoints" else _DETECTION_METRICS
    return scored(run, dataset, names)


def scored(run: COCOeval, dataset: CocoDataset, names: Sequence[str]) -> dict[str, float]:
    """What the official tool makes of a run: its metrics by these names, then AP-<class>."""
    run.evaluate()
    run.accumulate()
    run.summarize()
    results = {name: percent(value) for name, value in zip(names, run.stats, strict=True)}
    # (IoU thresholds, recalls, categories in the order of their ids, areas, detections per image)
    precision = run.eval["precision"][:, :, :, 0, -1]
    for index, name in enumerate(dataset.classes):
        known = precision[:, :, index]
        known = known[known > -1]
        results[f"AP-{name}"] = percent(known.mean() if known.size else -1)
    return results


def percent(value: float) -> float:
    """The tool marks a metric without ground truth with -1."""
    return float(100 * value) if value >= 0 else float("nan")


def load_ground_truth(dataset: CocoDataset) -> COCO:
    """The annotation file, with what the tool needs and users' own files often lack."""
    content = read_coco(dataset.json_file)
    for image in content["images"]:
        if "height" not in image or "width" not in image:
            image["height"], image["width"] = image_size(dataset.image_dir / image["file_name"])
    ground_truth = _indexed(content)
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = _area(ground_truth, annotation, dataset)
    return ground_truth


def _area(ground_truth: COCO, annotation: dict[str, Any], dataset: CocoDataset) -> float:
    """COCO's: of the mask where there is one, else of the box."""
    if annotation.get("segmentation"):
        return float(coco_mask.area(_run_lengths(ground_truth, annotation, dataset)))
    return annotation["bbox"][2] * annotation["bbox"][3]


def _run_lengths(
    ground_truth: COCO, annotation: dict[str, Any], dataset: CocoDataset
) -> dict[str, Any]:
    try:
        return ground_truth.annToRLE(annotation)
    except Exception as error:  # the tool raises that very class, and others
        raise UserError(
            f"{dataset.json_file}: the segmentation of annotation {annotation['id']} is broken: "
            f"{error}"
        ) from error


def _require_masks(ground_truth: COCO, dataset: CocoDataset) -> None:
    for number, annotation in ground_truth.anns.items():
        if not annotation.get("segmentation"):
            raise UserError(
                f"{dataset.json_file}: annotation {number} has no segmentation, without which "
                "masks cannot be scored: add it, or set MODEL.MASK_ON False"
            )
        annotation["segmentation"] = _run_lengths(ground_truth, annotation, dataset)


def _require_keypoints(ground_truth: COCO, dataset: CocoDataset) -> None:
    """An object without keypoints is, as in COCO's files, one with none of them labelled."""
    counts = {len(a["keypoints"]) for a in ground_truth.anns.values() if a.get("keypoints")}
    if len(counts) != 1 or min(counts) % 3:
        raise UserError(
            f"{dataset.json_file}: keypoints are scored where all objects have the same number of "
            f"them, (x, y, visibility) each; here are lists of length {sorted(counts) or 0}: "
            "correct them, or set MODEL.KEYPOINT_ON False"
        )
    length = counts.pop()
    for annotation in ground_truth.anns.values():
        if not annotation.get("keypoints"):
            annotation["keypoints"] = [0] * length
        labelled = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
        annotation.setdefault("num_keypoints", labelled)


def _check_keypoint_counts(
    ground_truth: COCO, dataset: CocoDataset, predictions: list[dict[str, Any]], sigmas: int
) -> None:
    annotated = len(next(iter(ground_truth.anns.values()))["keypoints"]) // 3
    if sigmas != annotated:
        raise UserError(
            f"{dataset.json_file} has {annotated} keypoints per object and there are {sigmas} "
            f"sigmas: set TEST.KEYPOINT_OKS_SIGMAS to {annotated} numbers"
        )
    for prediction in predictions:
        found = prediction["keypoints"]
        if len(found) and found.shape[1] != annotated:
            raise UserError(
                f"image {prediction['image_id']}: {found.shape[1]} keypoints were predicted where "
                f"{dataset.json_file} has {annotated}: set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
            )


def image_sizes(ground_truth: Any) -> dict[int, tuple[int, int]]:
    """Image id -> (height, width), of an annotation file as COCO's or LVIS' tool holds it."""
    return {i: (image["height"], image["width"]) for i, image in ground_truth.imgs.items()}


def load_results(ground_truth: COCO, results: list[dict[str, Any]]) -> COCO:
    """Results in COCO's format, for the tool."""
    if not results:  # loadRes fails on an empty list
        return _indexed({**ground_truth.dataset, "annotations": []})
    return ground_truth.loadRes(results)


def as_results(
    prediction: dict[str, Any], category_ids: Sequence[int], task: str
) -> list[dict[str, Any]]:
    """One image's detections in COCO's result format, which is also LVIS's, for one task.

    "segm" goes without the box: where there is one, the tools take its area for the mask's.
    """
    boxes = prediction["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = {"bbox": boxes.tolist()}
    if task == "segm":
        columns = {"segmentation": [dict(shape) for shape in prediction["segmentations"]]}
    elif task == "keypoints":
        keypoints = prediction["keypoints"].clone()
        keypoints[..., :2] -= 0.5
        columns["keypoints"] = keypoints.flatten(1).tolist() if len(keypoints) else []
    columns["score"] = prediction["scores"].tolist()
    columns["category_id"] = [category_ids[label] for label in prediction["classes"].tolist()]
    rows = zip(*columns.values(), strict=True)
    return [
        {"image_id": prediction["image_id"], **dict(zip(columns, row, strict=True))} for row in rows
    ]


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco
