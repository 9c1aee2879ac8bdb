"""COCO's DensePose metrics: AP and AR over the geodesic point similarity, in Detectron2's numbers.

The official tool for keypoints (pycocotools) does what the two have in common: the thresholds 0.5
to 0.95, at most 20 detections per image, medium and large objects, precision over recall.
"""

import contextlib
import io
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_det.common.errors import UserError
from moco_det.datasets import DensePoseDataset
from moco_det.densepose.body import Geodesics, Pairs, pairwise_similarity, read_geodesics
from moco_det.evaluation.coco import (
    KEYPOINT_METRICS,
    as_results,
    evaluate_coco,
    image_sizes,
    load_ground_truth,
    load_results,
    scored,
)
from moco_det.evaluation.predictions import have

# In Detectron2's names.
_MEASURES: dict[str, Callable[[Pairs], np.ndarray]] = {
    "densepose_gps": lambda pairs: pairs.gps,
    "densepose_gpsm": lambda pairs: np.sqrt(pairs.gps * pairs.masks),
    "densepose_segm": lambda pairs: pairs.masks,
}
_SAME_BOX = 0.8  # overlap from which an unmatched detection is taken to be of that object


def evaluate_densepose(
    dataset: DensePoseDataset,
    predictions: list[dict[str, Any]],
    only: Collection[int | str] | None = None,
) -> dict[str, dict[str, float]]:
    """COCO's metrics as `evaluate_coco` gives them, and those of dense pose where it was predicted.

    These are, in percent, {"densepose_gps", "densepose_gpsm", "densepose_segm"} -> {"AP", "AP50",
    "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl", "AP-<class>"}: a detection matches an
    object where GPS, the geometric mean of GPS and the overlap of masks (GPSm), or that overlap is
    above the threshold; NaN where there is no ground truth.

    As in Detectron2, an object without annotated points is neither missed nor found wrongly; all
    detections are ignored in an image in which no object counts, and one that fits none at 0.95
    but has the box of one is ignored where that object is. No files of the template body are
    needed for predictions without dense pose. `only`: the images that count; None for all.

    Raises:
        UserError: files of the template body are missing; the ground truth has no dense pose or a
            broken one.
        ValueError: predictions for other images, or with charts that do not exist.
    """
    results = evaluate_coco(dataset, predictions, only=only)
    if not have(predictions, "densepose"):
        return results
    geodesics = read_geodesics()
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = load_ground_truth(dataset, only=only)
        require_dense_pose(ground_truth.anns.values(), dataset)
        found = load_results(ground_truth, _results(dataset, predictions))
        similarities = _Similarities(ground_truth, geodesics)
        return results | {
            task: scored(
                _Matching(ground_truth, found, similarities, measure), dataset, KEYPOINT_METRICS
            )
            for task, measure in _MEASURES.items()
        }


def require_dense_pose(annotations: Iterable[dict], dataset: DensePoseDataset) -> None:
    """UserError where none has dense pose."""
    if not any("dp_x" in annotation for annotation in annotations):
        raise UserError(
            f"{dataset.json_file}: no annotation has dp_x and its like, without which dense pose "
            "cannot be scored: add them, or set MODEL.DENSEPOSE_ON False"
        )


def _results(dataset: DensePoseDataset, predictions: list[dict[str, Any]]) -> list[dict]:
    return [
        {**result, "densepose": surface}
        for prediction in predictions
        for result, surface in zip(
            as_results(prediction, dataset.category_ids, "bbox"),
            prediction["densepose"],
            strict=True,
        )
    ]


class _Similarities:
    """The pairs of each image, computed once for all measures: unpacking surfaces takes time."""

    def __init__(self, ground_truth: COCO, geodesics: Geodesics):
        self._sizes = image_sizes(ground_truth)
        self._geodesics = geodesics
        self._known: dict[tuple, Pairs] = {}

    def __call__(self, key: tuple, objects: list[dict], detections: list[dict]) -> Pairs:
        """`key`: (image id, category id); for the rest see `pairwise_similarity`."""
        if key not in self._known:
            size = self._sizes[key[0]]
            self._known[key] = pairwise_similarity(objects, detections, size, self._geodesics)
        return self._known[key]


class _Matching(COCOeval):
    """The official tool with a measure of its own, and the exceptions of dense pose.

    Names that are not ours are the tool's: `evaluate` calls `computeOks` and `evaluateImg`.
    """

    def __init__(
        self,
        ground_truth: COCO,
        found: COCO,
        similarities: _Similarities,
        measure: Callable[[Pairs], np.ndarray],
    ):
        for annotation in ground_truth.anns.values():
            annotation["num_keypoints"] = 1  # the tool asks; `_prepare` decides what to ignore
        super().__init__(ground_truth, found, iouType="keypoints")
        self._similarities = similarities
        self._measure = measure

    def _prepare(self) -> None:
        super()._prepare()
        for annotation in self.cocoGt.anns.values():
            annotation["ignore"] = "dp_x" not in annotation

    def _pairs(self, image: int, category: int) -> Pairs:
        """Of the best detections, the best first, and all objects."""
        key = image, category
        return self._similarities(key, self._gts[key], self._best(key))

    def _best(self, key: tuple[int, int]) -> list[dict]:
        best_first = sorted(self._dts[key], key=lambda detection: -detection["score"])
        return best_first[: self.params.maxDets[-1]]

    def computeOks(self, image: int, category: int) -> np.ndarray:
        return self._measure(self._pairs(image, category))

    def evaluateImg(self, image: int, category: int, area_range, most: int) -> dict | None:
        """The tool's matches, and which detections are ignored besides."""
        match = super().evaluateImg(image, category, area_range, most)
        if match is None:
            return None
        if all(match["gtIgnore"]):
            match["dtIgnore"][:] = True
            return match
        objects = self._gts[image, category]
        order = np.argsort([item["_ignore"] for item in objects], kind="stable")
        crowds = np.array([item["iscrowd"] for item in objects], dtype=bool)[order]
        overlaps = self._pairs(image, category).boxes[:, order]
        _ignore_same_boxes(match, overlaps, crowds)
        areas = np.array([item["area"] for item in self._best((image, category))])
        outside = (areas < area_range[0]) | (areas > area_range[1])
        match["dtIgnore"] |= outside & (match["dtMatches"] == 0)
        return match


def _ignore_same_boxes(match: dict, overlaps: np.ndarray, crowds: np.ndarray) -> None:
    """A detection unmatched at the last threshold shares the fate of the object with its box.

    As in Detectron2 this then holds at every threshold, and of equal overlaps the last counts.

    Args:
        match: what the tool's `evaluateImg` returns; changed.
        overlaps: (D, G) of boxes, in the order of its "dtIds" and "gtIds".
        crowds: (G,), whether any number of detections may be of this object.
    """
    taken = match["gtMatches"][-1]
    for row in np.flatnonzero(match["dtMatches"][-1] == 0):
        free = np.where((taken == 0) | crowds, overlaps[row], 0)
        column = len(free) - 1 - int(free[::-1].argmax())
        if free[column] < _SAME_BOX:
            continue
        ignored = bool(match["gtIgnore"][column])
        match["dtIgnore"][:, row] = ignored
        if ignored:
            taken[column] = match["dtIds"][row]
