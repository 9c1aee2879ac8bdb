"""COCO's JSON annotations: boxes, masks, keypoints."""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.datasets.dataset import Dataset, Record, image_size, require

# name -> (annotation file, image folder)
_BUILTIN = {
    "coco_2014_train": ("instances_train2014.json", "train2014"),
    "coco_2014_val": ("instances_val2014.json", "val2014"),
    "coco_2014_minival": ("instances_minival2014.json", "val2014"),
    "coco_2014_valminusminival": ("instances_valminusminival2014.json", "val2014"),
    "coco_2017_train": ("instances_train2017.json", "train2017"),
    "coco_2017_val": ("instances_val2017.json", "val2017"),
    "coco_2017_val_100": ("instances_val2017_100.json", "val2017"),
}
_BUILTIN |= {
    f"keypoints_{name}": (json_name.replace("instances", "person_keypoints"), image_dir)
    for name, (json_name, image_dir) in _BUILTIN.items()
}
NAMES = tuple(_BUILTIN)


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """COCO's instances format. `category_ids[i]` is the file's id of contiguous category `i`."""

    evaluator: ClassVar[str] = "coco"
    json_file: Path
    image_dir: Path
    category_ids: tuple[int, ...]

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


Opened = TypeVar("Opened", bound=CocoDataset)


def builtin(name: str, root: Path) -> CocoDataset:
    """The data set of `NAMES`, below the folder `root`."""
    json_name, image_dir = _BUILTIN[name]
    json_file = root / "coco" / "annotations" / json_name
    return open_coco(CocoDataset, name, json_file, root / "coco" / image_dir, holder=root)


def own(name: str, json_file: Path, image_dir: str) -> CocoDataset:
    """The data set of an annotation file and an image folder, called `name`."""
    return open_coco(CocoDataset, name, json_file, Path(image_dir).expanduser())


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


def open_coco(
    kind: type[Opened], name: str, json_file: Path, image_dir: Path, holder: Path | None = None
) -> Opened:
    """The data set of a `kind` that an annotation file and an image folder make up.

    `holder`: the root of the built-in data sets, for the message of a missing file.
    """
    require(name, json_file, holder)
    require(name, image_dir, holder)
    categories = read_categories(json_file)
    classes = tuple(category["name"] for category in categories)
    ids = tuple(category["id"] for category in categories)
    keypoints = {tuple(category.get("keypoints", ())) for category in categories} - {()}
    names = keypoints.pop() if len(keypoints) == 1 else ()
    return kind(name, classes, json_file, image_dir, ids, keypoint_names=names)


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
