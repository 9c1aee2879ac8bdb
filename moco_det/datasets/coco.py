"""COCO's JSON annotations: boxes, masks, keypoints; LVIS v0.5 and DensePose, which add to them.

The files are read and checked by `coco_file`; here their content becomes records.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from moco_det.common.errors import UserError
from moco_det.datasets.coco_annotations import compressed, rle_problem
from moco_det.datasets.coco_file import (
    CocoContent,
    load_coco,
    no_collection,
    read_categories,
    read_content,
)
from moco_det.datasets.dataset import NOTHING, Dataset, Record, Wanted, require
from moco_det.datasets.problems import DatasetError, Problems, shown

LVIS_CLASSES = 1230
_LVIS_V1_CLASSES = 1203
_LVIS_KNOWN = ("neg_category_ids", "not_exhaustive_category_ids")  # of each image
_LVIS_FREQUENCIES = {"r", "c", "f"}  # rare, common, frequent

# field -> least and greatest number: across the box, of charts, on the chart
_DP_RANGES = {"dp_x": (0, 256), "dp_y": (0, 256), "dp_I": (0, 24), "dp_U": (0, 1), "dp_V": (0, 1)}
_DP_MASKS = "dp_masks"
_DP_MASK_COUNT, _DP_MASK_SIZE = 14, [256, 256]


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """COCO's instances format. `category_ids[i]` is the file's id of contiguous category `i`.

    `skeleton`: pairs of keypoints that are joined by a line, by their number from 0 on.
    """

    evaluator: ClassVar[str] = "coco"
    form: ClassVar[str] = "ANNOTATIONS.json:IMAGE_DIR"
    image_keys: ClassVar[tuple[str, ...]] = ("id", "file_name")
    json_file: Path
    image_dir: Path
    category_ids: tuple[int | str, ...]
    skeleton: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> "CocoDataset":
        image_dir = Path(second).expanduser()
        require(name, (first, image_dir), data_root)
        entries = _category_entries(first)
        cls._check_version(first, entries)
        categories = read_categories(entries, problems or Problems(first))
        classes = tuple(category["name"] for category in categories)
        ids = tuple(category["id"] for category in categories)
        keypoints = {tuple(category.get("keypoints", ())) for category in categories} - {()}
        names = keypoints.pop() if len(keypoints) == 1 else ()
        lines = next((c["skeleton"] for c in categories if c["skeleton"]), ()) if names else ()
        skeleton = tuple((a - 1, b - 1) for a, b in lines)
        return cls(name, classes, first, image_dir, ids, keypoint_names=names, skeleton=skeleton)

    @property
    def required(self) -> tuple[Path, ...]:
        return self.json_file, self.image_dir

    @classmethod
    def _check_version(cls, json_file: Path, entries: tuple[Any, ...]) -> None:
        """UserError where the categories are not those that this kind of data set has."""

    def content(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> CocoContent:
        """What the file holds, checked; see `coco_file`. Raises as `records`."""
        problems = problems or Problems(self.json_file)
        raw = load_coco(self.json_file)
        found = read_categories(raw[0]["categories"], problems)
        categories = {c["id"]: c for c in found if c["id"] in self.category_ids}
        return read_content(raw, categories, self.image_path, problems, wanted, self.image_keys)

    @no_collection()
    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """As in `Dataset`, sorted by image id, which is the number in the file.

        An annotation also has, where the file has it, "segmentation": a list of polygons
        [x0, y0, x1, y1, ...] or a compressed RLE dict; and "keypoints": [x, y, visibility, ...],
        where the file's pixel indices are moved by 0.5 to the pixels' centres.

        As in Detectron2, crowds are kept; invalid polygons are left out, and so is an object that
        has only such.
        """
        problems = problems or Problems(self.json_file)
        content = self.content(problems, wanted)
        contiguous = {category_id: index for index, category_id in enumerate(self.category_ids)}
        annotations_of = defaultdict(list)
        for annotation in content.annotations:
            record = self._annotation(annotation, contiguous)
            if record is not None:
                annotations_of[annotation["image_id"]].append(record)
        records = []
        for image_id, image in sorted(content.images.items()):
            if "height" in image:
                records.append(self._record(image, annotations_of[image_id]))
            else:
                problems.refuse("image", f"{self.image_path(image)} does not exist")
        return records

    def _annotation(self, annotation: dict[str, Any], contiguous: dict) -> dict[str, Any] | None:
        """One object of a record; None if it has no area or, despite polygons, no valid one."""
        x, y, width, height = annotation["bbox"]
        record = {
            "bbox": [x, y, x + width, y + height],
            "category_id": contiguous[annotation["category_id"]],
            "iscrowd": annotation["iscrowd"],
        }
        if "segmentation" in annotation:
            record["segmentation"] = annotation["segmentation"]
        if "keypoints" in annotation:
            numbers = enumerate(annotation["keypoints"])
            record["keypoints"] = [n if i % 3 == 2 else n + 0.5 for i, n in numbers]
        has_shape = min(width, height) > 0 and record.get("segmentation") != []
        return record if has_shape else None

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        return {
            "file_name": str(self.image_path(image)),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": annotations,
        }

    def image_path(self, image: dict[str, Any]) -> Path:
        """The file of an entry of the section "images"."""
        return self.image_dir / image["file_name"]


# By file and its state, because all of a file must be read to get them.
_CATEGORIES: dict[tuple[Path, int, int], tuple[Any, ...]] = {}


def _category_entries(json_file: Path) -> tuple[Any, ...]:
    """The section "categories" of a file, unchecked; `UserError` if it is none of COCO's."""
    try:
        state = json_file.stat()
    except OSError as error:
        raise UserError(f"cannot read COCO annotations {json_file}: {error}") from error
    key = json_file, state.st_mtime_ns, state.st_size
    if key not in _CATEGORIES:
        sections, _ = load_coco(json_file)
        _CATEGORIES[key] = tuple(sections["categories"])
    return _CATEGORIES[key]


def known_categories() -> dict[tuple, tuple]:
    """The sections "categories" that were read so far; for `remember_categories` elsewhere."""
    return dict(_CATEGORIES)


def remember_categories(found: dict[tuple, tuple]) -> None:
    """Spare this process the files of which another one has `found` the categories."""
    _CATEGORIES.update(found)


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
    image_keys: ClassVar[tuple[str, ...]] = ("id", "coco_url", *_LVIS_KNOWN)

    @property
    def frequencies(self) -> list[str]:
        """Of each class: "r", "c" or "f"."""
        of = {entry["id"]: entry["frequency"] for entry in _category_entries(self.json_file)}
        return [of[number] for number in self.category_ids]

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> "LvisDataset":
        if data_root is not None:
            _, split = name.rsplit("_", 1)
            require(name, [Path(second) / f"{split}2017"], data_root)
        return super().open(name, first, second, data_root, problems)

    @classmethod
    def _check_version(cls, json_file: Path, entries: tuple[Any, ...]) -> None:
        """The file names no version; its categories tell."""
        if len(entries) != LVIS_CLASSES:
            version = "LVIS v1" if len(entries) == _LVIS_V1_CLASSES else "not LVIS v0.5"
            raise DatasetError(
                "version",
                f"{json_file} has {len(entries):,} categories, so it is {version}: the paper's "
                f"LVIS is v0.5, with {LVIS_CLASSES:,}; take its files, lvis_v0.5_train.json and "
                "_val.json",
            )
        known = [entry.get("frequency") for entry in entries if isinstance(entry, dict)]
        if not all(isinstance(found, str) and found in _LVIS_FREQUENCIES for found in known):
            raise DatasetError(
                "version",
                f"{json_file} is not LVIS v0.5: each of its categories has a frequency, r, c or f",
            )

    def content(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> CocoContent:
        problems = problems or Problems(self.json_file)
        content = super().content(problems, wanted)
        for image in content.images.values():
            for key in _LVIS_KNOWN:
                if not isinstance(image[key], list):
                    text = f"image {image['id']} has {key} {shown(image[key])}: it is a list"
                    problems.refuse("annotation", text)
                    image[key] = []
        for annotation in content.annotations:
            if annotation["iscrowd"]:  # the metric would take it for an object to find
                text = f"{content.label(annotation)} has iscrowd 1; LVIS has no crowds"
                problems.refuse("annotation", text)
        return content

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
        """COCO's, and as in Detectron2 what is known of an image, as the file's category ids.

        "neg_category_ids": not in the image. "not_exhaustive_category_ids": in it, but not every
        object is annotated. Of all other classes without an annotation nothing is known.
        """
        known = {key: image[key] for key in _LVIS_KNOWN}
        return super()._record(image, annotations) | known

    def image_path(self, image: dict[str, Any]) -> Path:
        """By the URL as in Detectron2: "file_name" may be a name of 2014, "COCO_val2014_...jpg"."""
        *_, folder, name = "", *image["coco_url"].split("/")
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

    def content(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> CocoContent:
        """COCO's, with the fields of `dense_pose` checked, and their masks compressed."""
        problems = problems or Problems(self.json_file)
        content = super().content(problems, wanted)
        count = 0
        for annotation in content.annotations:
            try:
                found = dense_pose(annotation)
            except (TypeError, ValueError) as error:
                problems.refuse("dense pose", f"{content.label(annotation)} {error}")
                found = {}
            count += bool(found)
            for key in (*_DP_RANGES, _DP_MASKS):
                annotation.pop(key, None)
            annotation.update(found)
        problems.note(f"{count:,} of {len(content.annotations):,} objects have dense pose")
        if not count:
            text = "no object has dp_x, dp_y, dp_I, dp_U and dp_V"
            problems.flaw("dense pose", text)
        return content

    def _annotation(self, annotation: dict[str, Any], contiguous: dict) -> dict[str, Any] | None:
        """COCO's and, where the file has them, the fields of `dense_pose`, as in Detectron2."""
        record = super()._annotation(annotation, contiguous)
        posed = {k: annotation[k] for k in (*_DP_RANGES, _DP_MASKS) if k in annotation}
        return record and record | posed


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
    fields = [field for field in _DP_RANGES if annotation.get(field) is not None]
    if not fields:
        return {}
    if len(fields) < len(_DP_RANGES):
        lacking = ", ".join(field for field in _DP_RANGES if field not in fields)
        raise ValueError(f"has {', '.join(fields)} and lacks {lacking}")
    if not all(isinstance(annotation[field], list) for field in fields):
        raise ValueError(f"has a {', '.join(fields)} that is no list of numbers")
    lengths = {field: len(annotation[field]) for field in fields}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{length} {field}" for field, length in lengths.items())
        raise ValueError(f"has {listed}, which are to be of one length")
    for key, (least, greatest) in _DP_RANGES.items():
        for number in annotation[key]:
            if type(number) not in (int, float):
                raise ValueError(f"is a malformed annotation: {shown(number)} in {key}")
            if not least <= number <= greatest:
                raise ValueError(f"has {number} in {key}, which goes from {least} to {greatest}")
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
    if shape["size"] != _DP_MASK_SIZE:
        raise ValueError(
            f"has a mask of size {shown(shape['size'])} in {_DP_MASKS}, not of {_DP_MASK_SIZE}"
        )
    problem = rle_problem(shape)
    if problem:
        raise ValueError(f"has a mask in {_DP_MASKS} {problem}")
    return compressed(shape)
