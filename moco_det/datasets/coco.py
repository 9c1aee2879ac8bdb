"""COCO's JSON annotations: boxes, masks, keypoints; LVIS v0.5 and DensePose, which add to them."""

import functools
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.common.images import image_size
from moco_det.datasets.dataset import Dataset, Record, require

LVIS_CLASSES = 1230
_LVIS_V1_CLASSES = 1203
_LVIS_FREQUENCIES = {"r", "c", "f"}  # rare, common, frequent

# field -> least and greatest number: across the box, of charts, on the chart
_DP_RANGES = {"dp_x": (0, 256), "dp_y": (0, 256), "dp_I": (0, 24), "dp_U": (0, 1), "dp_V": (0, 1)}
_DP_MASKS = "dp_masks"
_DP_MASK_COUNT, _DP_MASK_SIZE = 14, [256, 256]


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """COCO's instances format. `category_ids[i]` is the file's id of contiguous category `i`."""

    evaluator: ClassVar[str] = "coco"
    form: ClassVar[str] = "ANNOTATIONS.json:IMAGE_DIR"
    json_file: Path
    image_dir: Path
    category_ids: tuple[int, ...]

    @classmethod
    def open(
        cls, name: str, first: Path, second: str, data_root: Path | None = None
    ) -> "CocoDataset":
        image_dir = Path(second).expanduser()
        require(name, (first, image_dir), data_root)
        categories = read_categories(first)
        cls._check_categories(first, categories)
        classes = tuple(category["name"] for category in categories)
        ids = tuple(category["id"] for category in categories)
        keypoints = {tuple(category.get("keypoints", ())) for category in categories} - {()}
        names = keypoints.pop() if len(keypoints) == 1 else ()
        return cls(name, classes, first, image_dir, ids, keypoint_names=names)

    @property
    def required(self) -> tuple[Path, ...]:
        return self.json_file, self.image_dir

    @classmethod
    def _check_categories(cls, json_file: Path, categories: tuple[dict[str, Any], ...]) -> None:
        """UserError where the categories are not those that this kind of data set has."""

    def records(self) -> list[Record]:
        """As in `Dataset`, sorted by image id, which is the number in the file.

        An annotation also has, where the file has it, "segmentation": a list of polygons
        [x0, y0, x1, y1, ...] or a compressed RLE dict; and "keypoints": [x, y, visibility, ...],
        where the file's pixel indices are moved by 0.5 to the pixels' centres.

        As in Detectron2, crowds are kept; invalid polygons are left out, and so is an object that
        has only such.
        """
        content = read_coco(self.json_file)
        contiguous = {category_id: index for index, category_id in enumerate(self.category_ids)}
        annotations_of = defaultdict(list)
        try:
            for annotation in content["annotations"]:
                record = self._annotation(annotation, contiguous)
                if record is not None:
                    annotations_of[annotation["image_id"]].append(record)
            images = sorted(content["images"], key=lambda image: image["id"])
            return [self._record(image, annotations_of[image["id"]]) for image in images]
        except KeyError as error:
            raise UserError(f"{self.json_file}: no such field or category: {error}") from error
        except (TypeError, ValueError, OverflowError) as error:  # the last: a run below zero
            raise UserError(f"{self.json_file}: malformed annotation: {error}") from error

    def _annotation(self, annotation: dict[str, Any], contiguous: dict) -> dict[str, Any] | None:
        """One object of a record; None if it has no area or, despite polygons, no valid one."""
        x, y, width, height = annotation["bbox"]
        record = {
            "bbox": [x, y, x + width, y + height],
            "category_id": contiguous[annotation["category_id"]],
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        if annotation.get("segmentation"):
            record["segmentation"] = _segmentation(annotation["segmentation"])
        if annotation.get("keypoints"):
            numbers = enumerate(annotation["keypoints"])
            record["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in numbers]
        has_shape = min(width, height) > 0 and record.get("segmentation") != []
        return record if has_shape else None

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        path = self.image_path(image)
        has_size = "height" in image and "width" in image
        height, width = (image["height"], image["width"]) if has_size else image_size(path)
        return {
            "file_name": str(path),
            "image_id": image["id"],
            "height": height,
            "width": width,
            "annotations": annotations,
        }

    def image_path(self, image: dict[str, Any]) -> Path:
        """The file of an entry of the section "images"."""
        return self.image_dir / image["file_name"]


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO instances file; `UserError` if it is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read COCO annotations {path}: {error}") from error
    sections = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(section not in content for section in sections):
        raise UserError(f"{path} is not in COCO's instances format: it needs {', '.join(sections)}")
    return content


def read_categories(json_file: Path) -> tuple[dict[str, Any], ...]:
    """The categories of a COCO instances file, sorted by id; `UserError` if it is not one."""
    state = json_file.stat()
    return _categories(json_file, (state.st_mtime_ns, state.st_size))


@functools.cache
def _categories(json_file: Path, state: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """Sorted by id. Kept for each state of a file, because all of it must be read to get them."""
    return tuple(sorted(read_coco(json_file)["categories"], key=lambda category: category["id"]))


def _segmentation(shape: list | dict[str, Any]) -> list[list[float]] | dict[str, Any]:
    """Polygons of at least three points, or an RLE in its compressed form."""
    if isinstance(shape, dict):
        compressed = not isinstance(shape["counts"], list)
        return shape if compressed else coco_mask.frPyObjects(shape, *shape["size"])
    return [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]


# -- LVIS v0.5 -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LvisDataset(CocoDataset):
    """LVIS v0.5: COCO's images and form, 1,230 classes, annotated in a federated way.

    MoCo (arXiv:1911.05722, Sec. 4.2) is evaluated on v0.5. Other versions have other classes and
    other images, so their numbers cannot be compared with the paper's; they are refused, by name
    and by the content of the file.

    `image_dir` holds the folders train2017 and val2017, or the images.
    """

    evaluator: ClassVar[str] = "lvis"

    @classmethod
    def open(
        cls, name: str, first: Path, second: str, data_root: Path | None = None
    ) -> "LvisDataset":
        if data_root is not None:
            _, split = name.rsplit("_", 1)
            require(name, [Path(second) / f"{split}2017"], data_root)
        return super().open(name, first, second, data_root)

    @classmethod
    def _check_categories(cls, json_file: Path, categories: tuple[dict[str, Any], ...]) -> None:
        """The file names no version; its categories tell."""
        if len(categories) != LVIS_CLASSES:
            version = "LVIS v1" if len(categories) == _LVIS_V1_CLASSES else "not LVIS v0.5"
            raise UserError(
                f"{json_file} has {len(categories):,} categories, so it is {version}: the paper's "
                f"LVIS is v0.5, with {LVIS_CLASSES:,}; take its files, lvis_v0.5_train.json and "
                "_val.json"
            )
        if any(category.get("frequency") not in _LVIS_FREQUENCIES for category in categories):
            raise UserError(
                f"{json_file} is not LVIS v0.5: each of its categories has a frequency, r, c or f"
            )

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        """COCO's, and as in Detectron2 what is known of an image, as the file's category ids.

        "neg_category_ids": not in the image. "not_exhaustive_category_ids": in it, but not every
        object is annotated. Of all other classes without an annotation nothing is known.
        """
        known = {key: image[key] for key in ("neg_category_ids", "not_exhaustive_category_ids")}
        return super()._record(image, annotations) | known

    def image_path(self, image: dict[str, Any]) -> Path:
        """By the URL as in Detectron2: "file_name" may be a name of 2014, "COCO_val2014_...jpg"."""
        folder, name = image["coco_url"].split("/")[-2:]
        within = self.image_dir / folder
        return (within if within.is_dir() else self.image_dir) / name


def refuse_other_versions(name: str) -> None:
    """UserError for a name of LVIS in another version, or in COCO's classes."""
    if re.match(r"lvis_(v(?!0\.5)|.*_cocofied)", name):
        raise UserError(
            f"dataset {name}: only LVIS v0.5 with its {LVIS_CLASSES:,} classes is supported, on "
            "which the paper's numbers were measured (v1 has 1,203 classes and other images); the "
            "names are lvis_v0.5_train and lvis_v0.5_val"
        )


# -- DensePose -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DensePoseDataset(CocoDataset):
    """COCO's instances format with dense pose: points of the persons' surface, see `dense_pose`.

    Evaluation needs files of the template body besides; see `moco_det.densepose.body`.
    """

    evaluator: ClassVar[str] = "densepose"

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
    fields = [field for field in _DP_RANGES if field in annotation]
    if not fields:
        return {}
    if len(fields) < len(_DP_RANGES):
        lacking = ", ".join(field for field in _DP_RANGES if field not in annotation)
        raise ValueError(f"has {', '.join(fields)} and lacks {lacking}")
    lengths = {field: len(annotation[field]) for field in fields}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{length} {field}" for field, length in lengths.items())
        raise ValueError(f"has {shown}, which are to be of one length")
    for field, (least, greatest) in _DP_RANGES.items():
        for number in annotation[field]:
            if not (math.isfinite(number) and least <= number <= greatest):
                raise ValueError(f"has {number} in {field}, which goes from {least} to {greatest}")
    if any(chart != int(chart) for chart in annotation["dp_I"]):
        raise ValueError("has charts in dp_I that are not whole numbers")
    found = {field: annotation[field] for field in fields}
    if annotation.get(_DP_MASKS):
        found[_DP_MASKS] = [_checked_mask(shape) for shape in _checked_masks(annotation[_DP_MASKS])]
    return found


def _checked_masks(masks: Any) -> list:
    if not isinstance(masks, list) or len(masks) != _DP_MASK_COUNT:
        count = len(masks) if isinstance(masks, list) else "no list of"
        raise ValueError(
            f"has {count} masks in {_DP_MASKS}, which holds {_DP_MASK_COUNT}, [] for none"
        )
    return masks


def _checked_mask(shape: Any) -> dict[str, Any] | list:
    """The mask in its compressed form; [] for none."""
    if not shape:
        return []
    if not isinstance(shape, dict) or not {"size", "counts"} <= shape.keys():
        raise ValueError(f"has a mask in {_DP_MASKS} that is not an RLE: it needs size and counts")
    if list(shape["size"]) != _DP_MASK_SIZE:
        raise ValueError(
            f"has a mask of size {shape['size']} in {_DP_MASKS}, not of {_DP_MASK_SIZE}"
        )
    return _segmentation(shape)
