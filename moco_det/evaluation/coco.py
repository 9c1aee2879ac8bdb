"""COCO's box metrics, computed by the official tool (pycocotools)."""

import contextlib
import io
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_det.datasets import CocoDataset, read_coco

# COCOeval.stats, in its order. Precision has Detectron2's names; AR1, AR10 and AR100 are recall
# with that many detections per image.
_METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


def evaluate_coco(dataset: CocoDataset, predictions: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's twelve box metrics, then AP-<class>, in percent; NaN where there is no ground truth.

    `predictions` as checked by `moco_det.evaluation.evaluate`. As in Detectron2, all images of the
    annotation file count. Unlike there, no detections at all is AP 0, not NaN.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _ground_truth(dataset)
        run = COCOeval(truth, _detections(truth, dataset, predictions), iouType="bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    results = {name: _percent(value) for name, value in zip(_METRICS, run.stats, strict=True)}
    # (IoU thresholds, recalls, categories in the order of their ids, areas, detections per image)
    precision = run.eval["precision"][:, :, :, 0, -1]
    for index, name in enumerate(dataset.classes):
        known = precision[:, :, index]
        known = known[known > -1]
        results[f"AP-{name}"] = _percent(known.mean() if known.size else -1)
    return results


def _percent(value: float) -> float:
    """The tool marks a metric without ground truth with -1."""
    return float(100 * value) if value >= 0 else float("nan")


def _ground_truth(dataset: CocoDataset) -> COCO:
    """The annotation file, with what the tool needs and users' own files often lack."""
    content = read_coco(dataset.json_file)
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return _indexed(content)


def _detections(truth: COCO, dataset: CocoDataset, predictions: list[dict[str, Any]]) -> COCO:
    results = [
        result
        for prediction in predictions
        for result in _results(prediction, dataset.category_ids)
    ]
    unknown = {prediction["image_id"] for prediction in predictions} - truth.imgs.keys()
    if unknown:
        raise ValueError(f"predictions for images that are not in the data set: {sorted(unknown)}")
    if not results:  # loadRes fails on an empty list
        return _indexed({**truth.dataset, "annotations": []})
    return truth.loadRes(results)


def _results(prediction: dict[str, Any], category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """One image's detections in COCO's result format, with [x, y, width, height] boxes."""
    boxes = prediction["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(
        boxes.tolist(), prediction["scores"].tolist(), prediction["classes"].tolist(), strict=True
    )
    return [
        {
            "image_id": prediction["image_id"],
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in columns
    ]


def _indexed(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco
