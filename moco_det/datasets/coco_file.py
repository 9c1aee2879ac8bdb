"""The reader of COCO's JSON: boxes, masks and keypoints, checked and completed.

    file -> load_coco (form of the file) -> read_categories, read_content (each entry; the
    annotations through `coco_annotations.AnnotationReader`)

What is read is what training, scoring, drawing and the doctor start from. An entry is checked
before anything is made of it: types, numbers that are finite and near the image, run lengths that
make up the image. null counts as absent.

Annotations get ids of our own, from 1 on in the order of the file: users number theirs from 0, anew
in each image, or not at all, while pycocotools says "unmatched" by 0 and keeps one of equal ids.
"""

import contextlib
import gc
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_det.common.errors import UserError
from moco_det.common.files import read_regular
from moco_det.common.images import image_size
from moco_det.datasets.coco_annotations import AnnotationReader, label, report_repeated
from moco_det.datasets.dataset import Wanted
from moco_det.datasets.problems import LONGEST_NAME, Problems, shown

SECTIONS = ("images", "annotations", "categories")
_LARGEST_ID = 2**53  # beyond it NumPy, which the tools sort ids with, makes floats of them
_MOST_PIXELS = 2**28  # that are believed without a look at the image's file

_Entry = dict[str, Any]


@dataclass(frozen=True)
class CocoContent:
    """What a file holds, without the entries that cannot be used.

    `images` by id; their "height" and "width" are whole numbers, or both absent where neither the
    file nor the image tells. `annotations` have an "id" from 1 on and an "iscrowd"; "segmentation"
    is a list of valid polygons (none, where the file has only others), an RLE, or absent. What the
    file has for an "id" is their "file_id", or None.
    """

    images: dict[int | str, _Entry]
    annotations: list[_Entry]

    def label(self, annotation: _Entry) -> str:
        """What a message calls an annotation."""
        return label(annotation["file_id"], annotation["id"], annotation["image_id"])


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Python's search for cycles put off: among a file's millions of lists there are none.

    It takes a third of the time of reading COCO's annotations.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@no_collection()
def load_coco(path: Path) -> tuple[dict[str, list], bool]:
    """The three sections of a file, unchecked but for being lists, and whether it has a NaN.

    Raises:
        UserError: it cannot be read or is not of this format.
    """
    seen = []

    def constant(name: str) -> float:
        seen.append(name)
        return float(name)

    try:
        content = json.loads(read_regular(path), parse_constant=constant)
    except RecursionError as error:
        raise UserError(f"cannot read COCO annotations {path}: it is nested too deeply") from error
    except (UserError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read COCO annotations {path}: {error}") from error
    if not isinstance(content, dict) or any(section not in content for section in SECTIONS):
        raise UserError(f"{path} is not in COCO's instances format: it needs {', '.join(SECTIONS)}")
    for section in SECTIONS:
        if not isinstance(content[section], list):
            raise UserError(
                f"{path} is not in COCO's instances format: its {section} are "
                f"{shown(content[section])}, not a list"
            )
    return content, "NaN" in seen


# -- categories and images ------------------------------------------------------------------------


def read_categories(entries: Sequence[Any], problems: Problems) -> tuple[_Entry, ...]:
    """The categories sorted by id, "keypoints" and "skeleton" of one form or absent."""
    found: dict[Any, _Entry] = {}
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not {"id", "name"} <= entry.keys():
            text = f"category number {place} is {shown(entry)}: it needs id and name"
            problems.refuse("classes", text)
        elif entry["id"].__hash__ and entry["id"] in found:
            problems.refuse("classes", f"category {shown(entry['id'])} is listed twice")
        elif _is_id(entry["id"], "category", found, problems):
            found[entry["id"]] = _category(entry, problems)
    categories = tuple(found[key] for key in sorted(found))
    names = Counter(category["name"] for category in categories)
    for name in (name for name, times in names.items() if times > 1):
        ids = ", ".join(str(c["id"]) for c in categories if c["name"] == name)
        text = f"the categories {ids} are all called {shown(name)}: give each a name of its own"
        problems.refuse("classes", text)
    return categories


def _category(entry: _Entry, problems: Problems) -> _Entry:
    where = f"category {entry['id']}"
    category = {key: value for key, value in entry.items() if value is not None}
    name, keypoints = entry["name"], category.get("keypoints", [])
    if not isinstance(name, str) or not name.strip():
        problems.refuse("classes", f"{where} has the name {shown(name)}, which is no text")
        category["name"] = str(name)
    if not isinstance(keypoints, list) or not all(isinstance(k, str) for k in keypoints):
        text = f"{where} has the keypoints {shown(keypoints)}, which are not a list of names"
        problems.refuse("keypoints", text)
        category.pop("keypoints")
        keypoints = []
    pairs = category.pop("skeleton", [])
    category["skeleton"] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if _is_pair(pair, len(keypoints)):
            category["skeleton"].append(pair)
        else:
            text = f"{where}: its skeleton has {shown(pair)}, which are not two of its keypoints"
            problems.flaw("keypoints", text)
    return category


def _is_pair(pair: Any, count: int) -> bool:
    is_pair = isinstance(pair, list) and len(pair) == 2
    return is_pair and all(type(end) is int and 1 <= end <= count for end in pair)


def _is_id(value: Any, what: str, others: dict, problems: Problems) -> bool:
    """Whether `value` can be the id of one more entry; all are numbers, or all are texts."""
    number = type(value) is int and abs(value) < _LARGEST_ID
    if not number and not (isinstance(value, str) and value):
        problems.refuse("list", f"an id of the {what} entries is {shown(value)}, no whole number")
        return False
    first = next(iter(others), value)
    if isinstance(value, str) != isinstance(first, str):
        text = f"the {what} ids {shown(first)} and {shown(value)} are a number and a text: use one"
        problems.refuse("list", text)
        return False
    return True


def _read_images(
    entries: list, keys: Sequence[str], path_of: Callable[[_Entry], Path], problems: Problems
) -> dict[int | str, _Entry]:
    images: dict[int | str, _Entry] = {}
    for place, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            problems.refuse("annotation", f"image number {place} is {shown(entry)}, not an entry")
            continue
        absent = [key for key in keys if entry.get(key) is None]
        if absent:
            text = f"an image lacks {', '.join(absent)}: {shown(entry, 80)}"
            problems.refuse("annotation", text)
        elif entry["id"].__hash__ and entry["id"] in images:
            problems.refuse("list", f"image {shown(entry['id'])} is listed twice")
        elif _is_id(entry["id"], "image", images, problems) and _has_file(entry, keys, problems):
            images[entry["id"]] = entry
            _set_size(entry, path_of(entry), problems)
    if not entries:
        problems.flaw("list", "the file lists no image")
    return images


def _has_file(entry: _Entry, keys: Sequence[str], problems: Problems) -> bool:
    """Whether the entry names a file, which is the second of `keys`."""
    name = entry[keys[1]]
    is_path = isinstance(name, str) and name.strip("/. ") and "\0" not in name
    if is_path and max(map(len, name.split("/"))) <= LONGEST_NAME:
        return True
    problems.refuse("image", f"image {entry['id']} has the {keys[1]} {shown(name)}: name its file")
    return False


def _set_size(entry: _Entry, path: Path, problems: Problems) -> None:
    """Make "height" and "width" whole numbers: the file's, else those of the image's header."""
    stated = [entry.pop(key, None) for key in ("height", "width")]
    size = tuple(int(n) for n in stated if type(n) in (int, float) and n >= 1 and n == n // 1)
    if None in stated:
        size = _header_size(path, problems)
    elif len(size) < 2:
        text = (
            f"image {entry['id']} has a height and width of {shown(stated)}: correct or omit them"
        )
        problems.refuse("size", text)
        size = _header_size(path, problems)
    elif size[0] * size[1] > _MOST_PIXELS and _header_size(path, problems) != size:
        text = f"image {entry['id']} has a height and width of {shown(stated)}, not its file's"
        problems.refuse("size", text)
        size = _header_size(path, problems)
    if size is not None:
        entry["height"], entry["width"] = size


def _header_size(path: Path, problems: Problems) -> tuple[int, int] | None:
    """(height, width) of an image; None where there is none, or it cannot be read."""
    try:
        return image_size(path) if os.path.isfile(path) else None
    except UserError as error:
        problems.refuse("image", error)
        return None


# -- all of a file ---------------------------------------------------------------------------------


@no_collection()
def read_content(
    raw: tuple[dict[str, list], bool],
    categories: dict[int | str, _Entry],
    path_of: Callable[[_Entry], Path],
    problems: Problems,
    wanted: Wanted,
    image_keys: Sequence[str] = ("id", "file_name"),
) -> CocoContent:
    """What a file holds, checked.

    Args:
        raw: of `load_coco`.
        categories: by id; see `read_categories`.
        path_of: the file of an image's entry, which has `image_keys`.
        wanted: what a model is to learn from the annotations.
    """
    sections, has_nan = raw
    problems.listed(len(sections["images"]), len(sections["annotations"]))
    images = _read_images(sections["images"], image_keys, path_of, problems)
    report_repeated(sections["annotations"], problems)
    reader = AnnotationReader(images, categories, problems, wanted, has_nan)
    annotations = []
    for place, entry in enumerate(sections["annotations"], start=1):
        if reader.read(entry, place):
            annotations.append(entry)
            entry["file_id"], entry["id"] = entry.get("id"), len(annotations)
    return CocoContent(images, annotations)
