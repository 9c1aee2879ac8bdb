"""Cityscapes' mask metrics, computed by the official tool (cityscapesscripts)."""

import copy
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError, import_optional
from moco_det.datasets.cityscapes import LABEL_IDS, CityscapesDataset
from moco_det.evaluation.official import old_numpy
from moco_det.evaluation.predictions import check_images, check_mask_sizes

_TOOL = "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"


def evaluate_cityscapes(
    dataset: CityscapesDataset, predictions: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """{"segm": {"AP", "AP50", "AP-<class>"}} in percent, NaN where there is no ground truth.

    Cityscapes scores masks only. AP is the mean over the overlaps .50:.05:.95 and the classes.

    The steps are the tool's own, called one by one: its one function for all of them also writes
    `matches.json` to the working directory (and fails in it at integers of today's NumPy), keeps
    the ground truth of a former call in a file, and takes its settings from environment variables
    and a global object, of which this is a copy.

    Args:
        dataset: whose maps are the ground truth; all images of the split count.
        predictions: as checked by `moco_det.evaluation.evaluate`.

    Raises:
        UserError: the package is not installed; there are boxes but no masks.
        ValueError: predictions for other images.
    """
    tool = import_optional(_TOOL, "this data set's metric", "cityscapesscripts")
    sizes = {r["image_id"]: (r["height"], r["width"]) for r in dataset.records()}
    check_images(predictions, sizes)
    check_mask_sizes(predictions, sizes)
    if any("segmentations" not in prediction for prediction in predictions):
        raise UserError(
            f"dataset {dataset.name}: Cityscapes scores masks, and none were predicted: set "
            "MODEL.MASK_ON True"
        )
    with tempfile.TemporaryDirectory(prefix="cityscapes_") as folder:
        averages = _run(tool, dataset, predictions, Path(folder))
    results = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
    results |= {f"AP-{name}": averages["classes"][name]["ap"] for name in dataset.classes}
    return {"segm": {name: float(100 * value) for name, value in results.items()}}


def _run(
    tool: ModuleType, dataset: CityscapesDataset, predictions: list[dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """The tool's averages, from files that are written to `folder`."""
    prediction_of = {prediction["image_id"]: prediction for prediction in predictions}
    maps = {image_id: str(path) for image_id, path in dataset.instance_files().items()}
    lists = [str(_write(folder, name, prediction_of.get(name), dataset.classes)) for name in maps]
    args = copy.copy(tool.args)
    args.predictionPath = str(folder)
    args.quiet = True
    tool.setInstanceLabels(args)
    with old_numpy(tool), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # no ground truth
        instances = tool.instances2dict(list(maps.values()))
        matches = tool.matchGtWithPreds(lists, list(maps.values()), instances, args)
        return tool.computeAverages(tool.evaluateMatches(matches, args), args)


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
