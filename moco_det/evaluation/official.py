"""LVIS's and Cityscapes' metrics, computed by optional packages.

LVIS's are those of `faster-coco-eval`, which has the rules of the official package `lvis` and gives
its numbers to the last digit (see test_official_lvis.py). The official one requires opencv-python,
which would be installed over opencv-python-headless, a second copy of the same files.

Cityscapes' tool is the official one. It is older than today's NumPy: it calls np.in1d, which left
NumPy with 2.4, and stops with an AttributeError. `old_numpy` puts a stand-in that has this name in
the place of `np` in the one module that asks for it, while a call runs; NumPy itself is not
touched, and nothing stays changed.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError, import_optional
from moco_det.datasets import CityscapesDataset, LvisDataset
from moco_det.datasets.cityscapes import LABEL_IDS, read_instances
from moco_det.evaluation.coco import (
    as_results,
    image_sizes,
    load_ground_truth,
    percent,
    require_masks,
)
from moco_det.evaluation.predictions import check_masks, tasks_of

DETECTIONS_PER_IMAGE = 300  # LVIS's rule, where COCO has 100
_LVIS_METRICS = {
    "AP": "AP_all", "AP50": "AP_50", "AP75": "AP_75",
    "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large",
    "APr": "APr", "APc": "APc", "APf": "APf",
}  # fmt: skip
_CITYSCAPES_TOOL = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"


class _OldNumPy:
    """NumPy with the name that the tool misses."""

    @staticmethod
    def in1d(elements: np.ndarray, values) -> np.ndarray:
        return np.isin(elements, values).ravel()

    def __getattr__(self, name: str):
        return getattr(np, name)


@contextlib.contextmanager
def old_numpy(module: ModuleType) -> Iterator[None]:
    """While open, `np` in `module` also has the name that NumPy has dropped."""
    module.np = _OldNumPy()
    try:
        yield
    finally:
        module.np = np


# -- LVIS ------------------------------------------------------------------------------------------


def evaluate_lvis(
    dataset: LvisDataset,
    predictions: list[dict[str, Any]],
    only: Collection[int | str] | None = None,
) -> dict[str, dict[str, float]]:
    """For each task of the predictions, "bbox" and "segm", LVIS's nine precisions in percent.

    APr, APc and APf are of the classes in under 10, 10 to 99, and 100 or more training images. NaN
    where there is no ground truth (Detectron2: -100); no detections at all is AP 0 (there: NaN). A
    detection counts in an image only if its class is known to be there or not to be there; one that
    matches nothing is passed over where the class is not annotated exhaustively. Keypoints, which
    LVIS does not have, are not scored.

    Args:
        dataset: whose annotation file is the ground truth.
        predictions: as checked by `moco_det.evaluation.evaluate`.
        only: the images that count; None for all.

    Raises:
        UserError: the package `faster-coco-eval` is not installed.
        ValueError: predictions for other images.
    """
    tool = import_optional("faster_coco_eval", "this data set's metric", "faster-coco-eval")
    tasks = [task for task in tasks_of(predictions) if task in ("bbox", "segm")]
    ground_truth = _lvis_ground_truth(tool, dataset, "segm" in tasks, only)
    check_masks(predictions, image_sizes(ground_truth))
    return {task: _lvis_metrics(tool, ground_truth, dataset, predictions, task) for task in tasks}


def _lvis_ground_truth(
    tool: ModuleType, dataset: LvisDataset, masks: bool, only: Collection[int | str] | None
):
    """The tool's own object, which it would fill from the file, unchecked and with the file's ids.

    `masks`: whether they are scored, and every object needs one.
    """
    content = dataset.content()
    if masks:
        require_masks(content, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        found = load_ground_truth(dataset, content, only).dataset
    frequency = dict(zip(dataset.category_ids, dataset.frequencies, strict=True))
    for category in found["categories"]:
        category["frequency"] = frequency[category["id"]]
    return tool.COCO(found)


def _lvis_metrics(
    tool: ModuleType,
    ground_truth,
    dataset: LvisDataset,
    predictions: list[dict[str, Any]],
    task: str,
) -> dict[str, float]:
    results = [r for p in predictions for r in _best(as_results(p, dataset.category_ids, task))]
    run = tool.COCOeval_faster(ground_truth, ground_truth.loadRes(results), task, lvis_style=True)
    run.params.maxDets = [DETECTIONS_PER_IMAGE]
    run.run()
    return {name: percent(run.stats_as_dict[theirs]) for name, theirs in _LVIS_METRICS.items()}


def _best(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of an image that count; the tool knows COCO's limit only, which is for each class."""
    return sorted(results, key=lambda result: -result["score"])[:DETECTIONS_PER_IMAGE]


# -- Cityscapes ------------------------------------------------------------------------------------


def evaluate_cityscapes(
    dataset: CityscapesDataset,
    predictions: list[dict[str, Any]],
    only: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """{"segm": {"AP", "AP50", "AP-<class>"}} in percent, NaN where there is no ground truth.

    Cityscapes scores masks only. AP is the mean over the overlaps .50:.05:.95 and the classes.

    The steps are the tool's own, called one by one: its one function for all of them also writes
    `matches.json` to the working directory (and fails in it at integers of today's NumPy), keeps
    the ground truth of a former call in a file, and takes its settings from environment variables
    and a global object, of which this is a copy.

    Args:
        dataset: whose maps are the ground truth.
        predictions: as checked by `moco_det.evaluation.evaluate`.
        only: the images that count; None for all of the split.

    Raises:
        UserError: the package is not installed; there are boxes but no masks.
        ValueError: predictions for other images.
    """
    tool = import_optional(_CITYSCAPES_TOOL, "this data set's metric", "cityscapesscripts")
    pairs = [pair for pair in dataset.pairs() if only is None or pair[0] in only]
    sizes = {image_id: read_instances(labels)[:2] for image_id, _, labels in pairs}
    check_masks(predictions, sizes)
    if any("segmentations" not in prediction for prediction in predictions):
        raise UserError(
            f"dataset {dataset.name}: Cityscapes scores masks, and none were predicted: set "
            "MODEL.MASK_ON True"
        )
    with tempfile.TemporaryDirectory(prefix="cityscapes_") as folder:
        averages = _cityscapes_averages(tool, dataset, predictions, Path(folder), pairs)
    results = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
    results |= {f"AP-{name}": averages["classes"][name]["ap"] for name in dataset.classes}
    return {"segm": {name: float(100 * value) for name, value in results.items()}}


def _cityscapes_averages(
    tool: ModuleType,
    dataset: CityscapesDataset,
    predictions: list[dict[str, Any]],
    folder: Path,
    pairs: list[tuple[str, Path, Path]],
) -> dict[str, Any]:
    """The tool's averages over `pairs`, from files that are written to `folder`."""
    prediction_of = {prediction["image_id"]: prediction for prediction in predictions}
    maps = {image_id: str(path) for image_id, _, path in pairs}
    lists = [str(_write(folder, name, prediction_of.get(name), dataset.classes)) for name in maps]
    args = copy.copy(tool.args)
    args.predictionPath = str(folder)
    args.quiet = True
    tool.setInstanceLabels(args)
    with old_numpy(tool), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # no ground truth
        instances = tool.instances2dict(list(maps.values()))
        matches = tool.matchGtWithPreds(lists, list(maps.values()), instances, args)
        return tool.computeAverages(_cityscapes_precisions(tool, matches, args), args)


def _cityscapes_precisions(tool: ModuleType, matches: dict[str, Any], args) -> np.ndarray:
    """The tool's AP, (distances, classes, overlaps), and 0 where it fails.

    It takes the last element of an empty list where none of a class's predictions counts, all of
    them lying on void, and nothing was found: an AP of 0, as it says itself without predictions.
    """
    try:
        return tool.evaluateMatches(matches, args)
    except IndexError:
        pass
    found = np.zeros((1, len(args.instLabels), len(args.overlaps)))
    one = copy.copy(args)
    for row, one.instLabels in enumerate([[label] for label in args.instLabels]):
        for column, one.overlaps in enumerate([[overlap] for overlap in args.overlaps]):
            with contextlib.suppress(IndexError):
                found[0, row, column] = tool.evaluateMatches(matches, one)[0, 0, 0]
    return found


def _write(
    folder: Path, image_id: str, prediction: dict[str, Any] | None, classes: tuple[str, ...]
) -> Path:
    """The tool's list of an image's detections, "mask file, labelId, score", beside their masks."""
    path = folder / f"{image_id}.txt"
    lines = []
    if prediction is not None:
        columns = (prediction["segmentations"], prediction["classes"], prediction["scores"])
        for index, (shape, label, score) in enumerate(zip(*columns, strict=True)):
            name = f"{image_id}_{index}.png"
            mask = Image.fromarray(coco_mask.decode(shape).astype(bool))
            mask.save(folder / name, compress_level=1)
            lines.append(f"{name} {LABEL_IDS[classes[int(label)]]} {float(score)!r}\n")
    path.write_text("".join(lines))
    return path
