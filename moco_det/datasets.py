"""Detection data sets by name, as lists of Detectron2's standard records.

Names of Detectron2, below $DETECTRON2_DATASETS (default `datasets/`), in its layout:
    voc_2007_trainval          VOC2007/{JPEGImages,Annotations,ImageSets/Main/trainval.txt}
    coco_2017_train            coco/annotations/instances_train2017.json, coco/train2017/
    keypoints_coco_2017_train  coco/annotations/person_keypoints_train2017.json, coco/train2017/
A folder of one's own, named in the YAML or on the command line, without registration:
    voc:ROOT:SPLIT             ROOT/{JPEGImages,Annotations,ImageSets/Main/SPLIT.txt}
    coco:ANNOTATIONS.json:IMAGE_DIR
"""

import difflib
import functools
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask

from moco_det.errors import UserError

Record = dict[str, Any]

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on

# name -> (folder, split)
_VOC_BUILTIN = {
    f"voc_{year}_{split}": (f"VOC{year}", split)
    for year in (2007, 2012)
    for split in ("train", "val", "trainval", "test")
}

# name -> (annotation file, image folder)
_COCO_BUILTIN = {
    "coco_2014_train": ("instances_train2014.json", "train2014"),
    "coco_2014_val": ("instances_val2014.json", "val2014"),
    "coco_2014_minival": ("instances_minival2014.json", "val2014"),
    "coco_2014_valminusminival": ("instances_valminusminival2014.json", "val2014"),
    "coco_2017_train": ("instances_train2017.json", "train2017"),
    "coco_2017_val": ("instances_val2017.json", "val2017"),
    "coco_2017_val_100": ("instances_val2017_100.json", "val2017"),
}
_COCO_BUILTIN |= {
    f"keypoints_{name}": (json_name.replace("instances", "person_keypoints"), image_dir)
    for name, (json_name, image_dir) in _COCO_BUILTIN.items()
}

_OWN_FORMS = "voc:ROOT:SPLIT or coco:ANNOTATIONS.json:IMAGE_DIR"


@dataclass(frozen=True)
class Dataset:
    """A named set of annotated images.

    `classes[i]` is the name of contiguous category `i`; `evaluator` says whose metric applies;
    `keypoint_names` are those of every object, where the annotations have keypoints.
    """

    evaluator: ClassVar[str]
    name: str
    classes: tuple[str, ...]
    keypoint_names: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def keypoint_flips(self) -> tuple[tuple[str, str], ...]:
        """The keypoints that trade places in a mirrored image, told by COCO's left_ and right_."""
        pairs = ((name, name.replace("left_", "right_", 1)) for name in self.keypoint_names)
        return tuple((a, b) for a, b in pairs if a != b and b in self.keypoint_names)

    def records(self) -> list[Record]:
        """One dict per image, always in the same order.

        {"file_name", "image_id", "height", "width", "annotations": [{"bbox": [x0, y0, x1, y1] in
        continuous pixel coordinates, "category_id": contiguous, "iscrowd": 0 or 1}]}. Boxes without
        area are left out. Raises `UserError` for a missing or malformed file.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class VocDataset(Dataset):
    """PASCAL VOC layout. `eleven_point`: AP as in VOC 2007, not as the area under the curve."""

    evaluator: ClassVar[str] = "voc"
    root: Path
    split: str
    eleven_point: bool = False

    def records(self) -> list[Record]:
        """As in `Dataset`; an annotation also has "difficult", 0 or 1.

        As in Detectron2, the image id is the file's stem, difficult objects are kept, and the
        1-based inclusive pixels of the file become continuous by subtracting 1 from xmin and ymin.
        """
        # An image may have any extension. Reversed: a .jpg wins over a .png of the same stem.
        folder = sorted((self.root / "JPEGImages").iterdir(), reverse=True)
        image_of = {path.stem: path for path in folder}
        return [self._record(image_id, image_of) for image_id in self._image_ids()]

    def _image_ids(self) -> list[str]:
        lines = _split_file(self.root, self.split).read_text().splitlines()
        return [line.split()[0] for line in lines if line.strip()]

    def _record(self, image_id: str, image_of: dict[str, Path]) -> Record:
        if image_id not in image_of:
            raise UserError(f"dataset {self.name}: no image {image_id}.* in {self.root}/JPEGImages")
        path = self.root / "Annotations" / f"{image_id}.xml"
        tree = _parse_xml(path)
        annotations = []
        for name, (xmin, ymin, xmax, ymax), difficult in _voc_objects(tree, path):
            if name not in self.classes:
                known = ", ".join(self.classes)
                raise UserError(f"dataset {self.name}: {path}: class {name!r} is not in {known}")
            # In VOC's inclusive numbers this is one pixel wide; in practice, a slip of the hand.
            if xmax <= xmin or ymax <= ymin:
                continue
            annotations.append(
                {
                    "bbox": [xmin - 1, ymin - 1, xmax, ymax],
                    "category_id": self.classes.index(name),
                    "iscrowd": 0,
                    "difficult": difficult,
                }
            )
        height, width = _voc_size(tree) or _image_size(image_of[image_id])
        return {
            "file_name": str(image_of[image_id]),
            "image_id": image_id,
            "height": height,
            "width": width,
            "annotations": annotations,
        }


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
                record = _coco_annotation(annotation, contiguous)
                if record is not None:
                    annotations_of[annotation["image_id"]].append(record)
            images = sorted(content["images"], key=lambda image: image["id"])
            return [_coco_record(i, self.image_dir, annotations_of[i["id"]]) for i in images]
        except KeyError as error:
            raise UserError(f"{self.json_file}: no such field or category: {error}") from error
        except (TypeError, ValueError, OverflowError) as error:  # the last: a run below zero
            raise UserError(f"{self.json_file}: malformed annotation: {error}") from error


def get_dataset(name: str) -> Dataset:
    """The data set of that name; see the head of this module for the names.

    Raises `UserError` for an unknown name and for a missing file or folder.
    """
    kind, _, rest = name.partition(":")
    first, _, second = rest.rpartition(":")
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    if name in _VOC_BUILTIN:
        folder, split = _VOC_BUILTIN[name]
        _require_voc(name, root / folder, split, holder=root)
        return VocDataset(name, VOC_CLASSES, root / folder, split, folder == "VOC2007")
    if name in _COCO_BUILTIN:
        json_name, image_dir = _COCO_BUILTIN[name]
        json_file = root / "coco" / "annotations" / json_name
        return _coco(name, json_file, root / "coco" / image_dir, holder=root)
    if kind == "voc" and first and second:
        folder = Path(first).expanduser()
        _require_voc(name, folder, second)
        return VocDataset(name, _classes_in(folder), folder, second)
    if kind == "coco" and first and second:
        return _coco(name, Path(first).expanduser(), Path(second).expanduser())
    if ":" in name:
        raise UserError(f"dataset {name!r}: a data set of one's own is written {_OWN_FORMS}")
    nearest = difflib.get_close_matches(name, [*_VOC_BUILTIN, *_COCO_BUILTIN], n=1, cutoff=0.0)[0]
    raise UserError(f"no dataset {name!r}: the nearest name is {nearest}; own data: {_OWN_FORMS}")


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


def _split_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / "Main" / f"{split}.txt"


def _require_voc(name: str, root: Path, split: str, holder: Path | None = None) -> None:
    for path in (root / "JPEGImages", root / "Annotations", _split_file(root, split)):
        _require(name, path, holder)


def _require(name: str, path: Path, holder: Path | None) -> None:
    """Check that `path` exists. `holder`: the root of the built-in data sets, for the message."""
    if path.exists():
        return
    message = f"dataset {name}: expected {path}, which does not exist"
    if holder is not None:
        message += f"; set DETECTRON2_DATASETS to the folder that is to hold it, now {holder}"
    raise UserError(message)


def _coco(name: str, json_file: Path, image_dir: Path, holder: Path | None = None) -> CocoDataset:
    _require(name, json_file, holder)
    _require(name, image_dir, holder)
    state = json_file.stat()
    categories = _coco_categories(json_file, (state.st_mtime_ns, state.st_size))
    classes = tuple(category["name"] for category in categories)
    ids = tuple(category["id"] for category in categories)
    keypoints = {tuple(category.get("keypoints", ())) for category in categories} - {()}
    names = keypoints.pop() if len(keypoints) == 1 else ()
    return CocoDataset(name, classes, json_file, image_dir, ids, keypoint_names=names)


@functools.cache
def _coco_categories(json_file: Path, state: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """Sorted by id. Kept for each state of a file, because all of it must be read to get them."""
    return tuple(sorted(read_coco(json_file)["categories"], key=lambda category: category["id"]))


def _classes_in(root: Path) -> tuple[str, ...]:
    """Sorted names over all annotations, not one split's, so that train and test agree."""
    names = set()
    for path in (root / "Annotations").glob("*.xml"):
        names.update(name for name, _, _ in _voc_objects(_parse_xml(path), path))
    if not names:
        raise UserError(f"{root}/Annotations/*.xml name no object")
    return tuple(sorted(names))


def _parse_xml(path: Path) -> ElementTree.ElementTree:
    try:
        return ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"cannot read annotation {path}: {error}") from error


def _voc_objects(
    tree: ElementTree.ElementTree, path: Path
) -> list[tuple[str, tuple[float, ...], int]]:
    """(class, (xmin, ymin, xmax, ymax) as in the file, difficult) of each object."""
    objects = []
    try:
        for node in tree.findall("object"):
            box = node.find("bndbox")
            corners = tuple(float(box.find(k).text) for k in ("xmin", "ymin", "xmax", "ymax"))
            difficult = int(node.findtext("difficult") or 0)
            objects.append((node.find("name").text.strip(), corners, difficult))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: an <object> lacks a <name> or the numbers of a <bndbox>"
        ) from error
    return objects


def _voc_size(tree: ElementTree.ElementTree) -> tuple[int, int] | None:
    """(height, width), or None where the annotation does not give them."""
    try:
        size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of an image."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read image {path}: {error}") from error


def _coco_annotation(
    annotation: dict[str, Any], contiguous: dict[int, int]
) -> dict[str, Any] | None:
    """One object of a record; None if it has no area or, though it has polygons, no valid one."""
    x, y, width, height = annotation["bbox"]
    record = {
        "bbox": [x, y, x + width, y + height],
        "category_id": contiguous[annotation["category_id"]],
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    if annotation.get("segmentation"):
        record["segmentation"] = _coco_segmentation(annotation["segmentation"])
    if annotation.get("keypoints"):
        numbers = enumerate(annotation["keypoints"])
        record["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in numbers]
    has_shape = min(width, height) > 0 and record.get("segmentation") != []
    return record if has_shape else None


def _coco_segmentation(shape: list | dict[str, Any]) -> list[list[float]] | dict[str, Any]:
    """Polygons of at least three points, or an RLE in its compressed form."""
    if isinstance(shape, dict):
        compressed = not isinstance(shape["counts"], list)
        return shape if compressed else coco_mask.frPyObjects(shape, *shape["size"])
    return [polygon for polygon in shape if len(polygon) >= 6 and len(polygon) % 2 == 0]


def _coco_record(image: dict, image_dir: Path, annotations: list[dict]) -> Record:
    path = image_dir / image["file_name"]
    has_size = "height" in image and "width" in image
    height, width = (image["height"], image["width"]) if has_size else _image_size(path)
    return {
        "file_name": str(path),
        "image_id": image["id"],
        "height": height,
        "width": width,
        "annotations": annotations,
    }
