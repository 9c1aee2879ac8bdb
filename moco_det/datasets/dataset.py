"""What a data set is: a name, classes, and Detectron2's standard records.

A user's own data set is named KIND:FIRST:SECOND, such as voc:ROOT:SPLIT. A built-in one is the same
thing below the data root, under Detectron2's name (`BUILT_IN`). So each kind is a subclass of
`Dataset` that says what its two parts are (`form`) and how a data set is opened.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from moco_det.common.errors import UserError
from moco_det.common.files import evenly_spaced
from moco_det.common.images import UnreadableImage, image_size
from moco_det.datasets.problems import Problem, Problems, refuse_each

Record = dict[str, Any]

REACH = 10  # in sides of an image, the longer one: how far from its origin an annotation may lie


@dataclass(frozen=True)
class Wanted:
    """What a model is to learn from annotations, without which a reader refuses them.

    `masks`: of every object but crowds; `polygons`: not run-length encoded; `keypoints`: how many
    of every object but crowds, 0 for none.
    """

    masks: bool = False
    polygons: bool = False
    keypoints: int = 0


NOTHING = Wanted()


class Source(NamedTuple):
    """Files that somebody hands out; the head of built_in.yaml says what the fields are."""

    site: str
    files: list[str]
    placing: str


@dataclass(frozen=True)
class BuiltIn:
    """What is known of a built-in data set; the head of built_in.yaml says what the fields are."""

    location: str
    sources: list[Source]
    images: int | None = None
    objects: int | None = None
    flaws: int = 0
    repeats: bool = False


def _read_built_in() -> dict[str, BuiltIn]:
    content = yaml.safe_load((Path(__file__).parent / "built_in.yaml").read_text())
    sources = {name: Source(**source) for name, source in content["sources"].items()}
    return {
        name: BuiltIn(**{**entry, "sources": [sources[key] for key in entry["sources"]]})
        for name, entry in content["names"].items()
    }


BUILT_IN = _read_built_in()


@dataclass(frozen=True)
class Dataset:
    """A named set of annotated images.

    `classes[i]` is the name of contiguous category `i`; `evaluator` says whose metric applies;
    `keypoint_names` are those of every object, where the annotations have keypoints.
    """

    evaluator: ClassVar[str]
    form: ClassVar[str]  # the two parts of a user's own name, such as "ROOT:SPLIT"
    name: str
    classes: tuple[str, ...]
    keypoint_names: tuple[str, ...] = field(default=(), kw_only=True)

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> "Dataset":
        """The data set called `name`, with the parts that `form` names.

        Args:
            data_root: of a built-in data set; None for one of the user's own.
            problems: told what is wrong with the classes; None: the first is raised.

        Raises:
            UserError: a file or folder is missing or is not of this kind.
        """
        raise NotImplementedError

    @property
    def required(self) -> tuple[Path, ...]:
        """The files and folders without which there is no such data set."""
        raise NotImplementedError

    @property
    def keypoint_flips(self) -> tuple[tuple[str, str], ...]:
        """Pairs of keypoints that a mirror swaps, by COCO's prefixes left_ and right_."""
        pairs = ((name, name.replace("left_", "right_", 1)) for name in self.keypoint_names)
        return tuple((a, b) for a, b in pairs if a != b and b in self.keypoint_names)

    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """One dict per image, always in the same order.

        {"file_name", "image_id", "height", "width", "annotations": [{"bbox": [x0, y0, x1, y1] in
        continuous pixel coordinates, "category_id": contiguous, "iscrowd": 0 or 1}]}. Boxes without
        area are left out.

        Args:
            problems: told what is wrong with the files; None: the first is raised.
            wanted: what a model is to learn.

        Raises:
            UserError: a missing or malformed file.
        """
        raise NotImplementedError


def require(name: str, paths: Iterable[Path], data_root: Path | None) -> None:
    """UserError for the first of `paths` that does not exist; `data_root`: see `Dataset.open`."""
    for path in paths:
        if not path.exists():
            message = f"dataset {name}: expected {path}, which does not exist"
            if data_root is not None:
                message += (
                    f"; set DETECTRON2_DATASETS to the folder that is to hold it, now {data_root}"
                )
            raise UserError(message)


def has_objects(record: Record) -> bool:
    """Whether anything but a crowd is annotated."""
    return any(not a.get("iscrowd", 0) for a in record["annotations"])


def count_keypoints(record: Record) -> int:
    """Labelled keypoints of all objects, crowds included (Detectron2)."""
    return sum(v > 0 for a in record["annotations"] for v in a.get("keypoints", ())[2::3])


def learnable(
    records: Sequence[Record],
    names: Sequence[str],
    filter_empty: bool,
    min_keypoints: int = 0,
    with_densepose: bool = False,
) -> list[Record]:
    """The records that a detector is trained on.

    Args:
        names: of the data sets, for the message.
        filter_empty: leave out the images that hold nothing but crowds.
        min_keypoints: leave out the images with fewer labelled keypoints.
        with_densepose: leave out the images without any dense pose.

    Raises:
        UserError: nothing is left.
    """
    used = [
        record
        for record in records
        if (has_objects(record) or not filter_empty)
        and count_keypoints(record) >= min_keypoints
        and (any("dp_x" in a for a in record["annotations"]) or not with_densepose)
    ]
    if not used:
        raise UserError(
            f"DATASETS.TRAIN {tuple(names)} holds no annotated image: check its split and "
            "annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    return used


# -- the images that a data set lists --------------------------------------------------------------
# Asked before a run of what it will train on and be scored on. Existence is asked of all, at the
# price of one listing for each folder; the size of as many as a second or two allow.

HEADERS = 5000  # of a data set that are read, evenly spaced; COCO's and VOC's tests have no more


class SplitLayout:
    """How a split in a folder is opened, for a `Dataset` with the fields `root` and `split`.

    `all_classes` are those of every data set of the kind.
    """

    form: ClassVar[str] = "ROOT:SPLIT"
    all_classes: ClassVar[tuple[str, ...]]

    @classmethod
    def open(
        cls,
        name: str,
        first: Path,
        second: str,
        data_root: Path | None = None,
        problems: Problems | None = None,
    ) -> Dataset:
        dataset = cls(name, cls.all_classes, first, second)
        require(name, dataset.required, data_root)
        return dataset


class ListedImage(NamedTuple):
    """An image that a data set lists, with the (height, width) that its annotation gives."""

    path: Path
    size: tuple[int, int]


def check_images(records: Sequence[Record], problems: Problems) -> list[ListedImage]:
    """Tell `problems` of images that are absent, cannot be read, or are of another size.

    Returns:
        Those that nothing is wrong with.
    """
    images = [ListedImage(Path(r["file_name"]), (r["height"], r["width"])) for r in records]
    present, absent = _on_disk(images)
    if images and not present:
        text = f"none of the {len(images):,} images exists; expected {images[0].path}"
        problems.refuse("layout", text)
        return []
    refuse_each("image", [f"{image.path} does not exist" for image in absent], problems)
    looked_at, wrong = evenly_spaced(present, HEADERS), set()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for image, found in zip(looked_at, threads.map(_header_problem, looked_at), strict=True):
            if found:
                wrong.add(image)
                problems.refuse(*found)
    return [image for image in present if image not in wrong]


def _on_disk(images: Sequence[ListedImage]) -> tuple[list[ListedImage], list[ListedImage]]:
    """Those that exist, and those that do not."""
    names: dict[Path, set[str]] = {}
    present, absent = [], []
    for image in images:
        folder = image.path.parent
        if folder not in names:
            names[folder] = _listing(folder)
        is_there = image.path.name in names[folder] or os.path.isfile(image.path)
        (present if is_there else absent).append(image)
    return present, absent


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):
        return set()


def _header_problem(image: ListedImage) -> Problem | None:
    try:
        size = image_size(image.path)
    except UnreadableImage as error:
        return Problem("image", f"{image.path} cannot be decoded: {error.reason}")
    return None if image.size == size else size_problem(image, size)


def size_problem(image: ListedImage, size: tuple[int, int]) -> Problem:
    """An image whose file is of another `size`, (height, width), than its annotation says."""
    (height, width), (h, w) = image.size, size
    text = f"{image.path} is {w}x{h} pixels, its annotation says {width}x{height}"
    return Problem("size", text)
