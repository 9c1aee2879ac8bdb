"""COCO's JSON annotations: boxes, masks, keypoints."""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets.dataset import Dataset, Record, image_size, require

_INSTANCES = {
    "coco_2014_train": ("coco/annotations/instances_train2014.json", "coco/train2014"),
    "coco_2014_val": ("coco/annotations/instances_val2014.json", "coco/val2014"),
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": (
        "coco/annotations/instances_valminusminival2014.json",
        "coco/val2014",
    ),
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "coco_2017_val_100": ("coco/annotations/instances_val2017_100.json", "coco/val2017"),
}
_KEYPOINTS = {
    f"keypoints_{name}": (json_file.replace("instances", "person_keypoints"), image_dir)
    for name, (json_file, image_dir) in _INSTANCES.items()
}


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """COCO's instances format. `category_ids[i]` is the file's id of contiguous category `i`."""

    evaluator: ClassVar[str] = "coco"
    form: ClassVar[str] = "ANNOTATIONS.json:IMAGE_DIR"
    builtin: ClassVar[dict[str, tuple[str, str]]] = _INSTANCES | _KEYPOINTS
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
        path = self._image_path(image)
        has_size = "height" in image and "width" in image
        height, width = (image["height"], image["width"]) if has_size else image_size(path)
        return {
            "file_name": str(path),
            "image_id": image["id"],
            "height": height,
            "width": width,
            "annotations": annotations,
        }

    def _image_path(self, image: dict[str, Any]) -> Path:
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
