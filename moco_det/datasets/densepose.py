"""COCO's DensePose annotations of 2014: persons, and points of their surface.

Below $DETECTRON2_DATASETS, in Detectron2's layout:
    densepose_coco_2014_train           coco/annotations/densepose_train2014.json, coco/train2014/
    densepose_coco_2014_minival         coco/annotations/densepose_minival2014.json, coco/val2014/
    densepose_coco_2014_minival_100     .../densepose_minival2014_100.json
    densepose_coco_2014_valminusminival .../densepose_valminusminival2014.json
or `densepose:ANNOTATIONS.json:IMAGE_DIR`. Evaluation needs files of the template body besides; see
`moco_det.densepose.body`.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets.coco import CocoDataset

# field -> least and greatest number: across the box, of charts, on the chart
_RANGES = {
    "dp_x": (0, 256),
    "dp_y": (0, 256),
    "dp_I": (0, 24),
    "dp_U": (0, 1),
    "dp_V": (0, 1),
}
_MASKS = "dp_masks"
_MASK_COUNT, _MASK_SIZE = 14, [256, 256]


@dataclass(frozen=True)
class DensePoseDataset(CocoDataset):
    """COCO's instances format with dense pose."""

    evaluator: ClassVar[str] = "densepose"
    builtin: ClassVar[dict[str, tuple[str, str]]] = {
        f"densepose_coco_2014_{part}": (f"coco/annotations/densepose_{file}.json", image_dir)
        for part, file, image_dir in (
            ("train", "train2014", "coco/train2014"),
            ("minival", "minival2014", "coco/val2014"),
            ("minival_100", "minival2014_100", "coco/val2014"),
            ("valminusminival", "valminusminival2014", "coco/val2014"),
        )
    }

    def _annotation(self, annotation: dict[str, Any], contiguous: dict) -> dict[str, Any] | None:
        """COCO's and, where the file has them, the fields of `dense_pose`, as in Detectron2."""
        record = super()._annotation(annotation, contiguous)
        try:
            return record and record | dense_pose(annotation)
        except ValueError as error:
            raise UserError(
                f"{self.json_file}: annotation {annotation.get('id', '?')} {error}"
            ) from error


def dense_pose(annotation: dict[str, Any]) -> dict[str, Any]:
    """The dense pose of one object; {} where it was not annotated.

    Returns:
        {"dp_x", "dp_y": the points' positions in the box, whose sides are 256 long; "dp_I": their
        charts, 1 to 24 (0 is none, and is ignored); "dp_U", "dp_V": their coordinates on the chart,
        0 to 1}, lists of one length; and, where the file has them, "dp_masks": for each of 14 parts
        of the body a compressed RLE of 256x256 over the box, or [] where it is hidden.

    Raises:
        ValueError: what is wrong with the annotation, to be read after its name.
    """
    fields = [field for field in _RANGES if field in annotation]
    if not fields:
        return {}
    if len(fields) < len(_RANGES):
        lacking = ", ".join(field for field in _RANGES if field not in annotation)
        raise ValueError(f"has {', '.join(fields)} and lacks {lacking}")
    lengths = {field: len(annotation[field]) for field in fields}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} {field}" for field, length in lengths.items())
        raise ValueError(f"has {shown}, which are to be of one length")
    for field, (least, greatest) in _RANGES.items():
        for number in annotation[field]:
            if not (math.isfinite(number) and least <= number <= greatest):
                raise ValueError(f"has {number} in {field}, which goes from {least} to {greatest}")
    if any(chart != int(chart) for chart in annotation["dp_I"]):
        raise ValueError("has charts in dp_I that are not whole numbers")
    found = {field: annotation[field] for field in fields}
    if annotation.get(_MASKS):
        found[_MASKS] = [_checked_mask(shape) for shape in _checked_list(annotation[_MASKS])]
    return found


def _checked_list(masks: Any) -> list:
    if not isinstance(masks, list) or len(masks) != _MASK_COUNT:
        count = len(masks) if isinstance(masks, list) else "no list of"
        raise ValueError(f"has {count} masks in {_MASKS}, which holds {_MASK_COUNT}, [] for none")
    return masks


def _checked_mask(shape: Any) -> dict[str, Any] | list:
    """The mask in its compressed form; [] for none."""
    if not shape:
        return []
    if not isinstance(shape, dict) or not {"size", "counts"} <= shape.keys():
        raise ValueError(f"has a mask in {_MASKS} that is not an RLE: it needs size and counts")
    if list(shape["size"]) != _MASK_SIZE:
        raise ValueError(f"has a mask of size {shape['size']} in {_MASKS}, not of {_MASK_SIZE}")
    if isinstance(shape["counts"], list):
        return coco_mask.frPyObjects(shape, *_MASK_SIZE)
    return shape
