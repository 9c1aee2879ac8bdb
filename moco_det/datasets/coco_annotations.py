"""The checks of one annotation of COCO's format, which also bring it to one form."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.datasets.dataset import REACH, Wanted
from moco_det.datasets.problems import Problems, shown

_Entry = dict[str, Any]


def report_repeated(annotations: list, problems: Problems) -> None:
    """Tell the ids that stand for one object several times; note those that stand for several."""
    entries = [a for a in annotations if isinstance(a, dict)]
    ids = Counter(i for a in entries if type(i := a.get("id")) in (int, str))
    if len(ids) == sum(ids.values()):
        return
    places: dict[Any, set[str]] = {}
    for a in entries:
        if type(a.get("id")) in (int, str) and ids[a["id"]] > 1:
            what = repr([a.get(key) for key in ("image_id", "category_id", "bbox")])
            places.setdefault(a["id"], set()).add(what)
    problems.repeated({i: ids[i] for i, what in places.items() if len(what) < ids[i]})
    shared = sum(len(what) == ids[i] for i, what in places.items())
    if shared:
        problems.note(
            f"{shared:,} annotation ids stand for several objects; scoring renumbers them"
        )


@dataclass
class AnnotationReader:
    """Checks annotations and brings them to one form.

    Its methods return False where an annotation cannot be used; each has been told by then.
    """

    images: dict[int | str, _Entry]
    categories: dict[int | str, _Entry]
    problems: Problems
    wanted: Wanted
    has_nan: bool

    def read(self, entry: Any, place: int) -> bool:
        """Check one annotation, the `place`th of the file, and complete it where it lies."""
        if not isinstance(entry, dict):
            text = f"annotation {place} of the file is {shown(entry)}, not an entry"
            self.problems.refuse("annotation", text)
            return False
        number = entry.get("id")
        if type(number) is float and not math.isfinite(number):
            return self._refuse("annotation", entry, place, "has an id that is no number")
        image = self._image(entry, place)
        if image is None:
            return False
        reach = REACH * max(image.get("height", 2**16), image.get("width", 2**16))
        of_a_class = self._category(entry, place)
        return all(
            (
                of_a_class,
                self._box(entry, image, reach, place),
                self._numbers(entry, place),
                self._shape(entry, image, reach, place),
                of_a_class and self._keypoints(entry, reach, place),
            )
        )

    def _label(self, entry: _Entry, place: int) -> str:
        return label(entry.get("id"), place, entry.get("image_id", "?"))

    def _refuse(self, check: str, entry: _Entry, place: int, text: str) -> bool:
        self.problems.refuse(check, f"{self._label(entry, place)} {text}")
        return False

    def _flaw(self, check: str, entry: _Entry, place: int, text: str) -> None:
        self.problems.flaw(check, f"{self._label(entry, place)} {text}")

    def _image(self, entry: _Entry, place: int) -> _Entry | None:
        number = entry.get("image_id")
        image = self.images.get(number) if type(number) in (int, str) else None
        if image is not None:
            return image
        known = next(iter(self.images), number)
        if type(number) is type(known):
            text = "is of an image that the file does not list"
            self._flaw("annotation", entry, place, text)
        else:
            text = f"has the image_id {shown(number)}; the images have ids like {shown(known)}"
            self._refuse("annotation", entry, place, text)
        return None

    def _category(self, entry: _Entry, place: int) -> bool:
        number = entry.get("category_id")
        if type(number) in (int, str) and number in self.categories:
            return True
        text = f"is of category {shown(number)}, which is not listed: add it to the categories"
        return self._refuse("classes", entry, place, text)

    def _box(self, entry: _Entry, image: _Entry, reach: float, place: int) -> bool:
        box = entry.get("bbox")
        try:
            x, y, width, height = box
            near = all(-reach <= n <= reach for n in (x, y, x + width, y + height))
        except (TypeError, ValueError, OverflowError):
            near = False
        if not near:
            text = (
                f"has the bbox {shown(box)}: it needs four finite numbers, x, y, width and height, "
                f"within {REACH} sides of the image"
            )
            return self._refuse("annotation", entry, place, text)
        if width <= 0 or height <= 0:
            self._flaw("area", entry, place, f"has a box of zero area, {shown(box)}")
        elif "height" in image and _is_outside(box, image["height"], image["width"]):
            self._flaw("box", entry, place, f"has a box outside of its image, {shown(box)}")
        return True

    def _numbers(self, entry: _Entry, place: int) -> bool:
        """iscrowd, area and num_keypoints."""
        crowd = entry.get("iscrowd")
        if crowd is None:
            crowd = 0
        if type(crowd) not in (int, bool, float) or crowd not in (0, 1):
            text = f"has iscrowd {shown(crowd)}, which is 0 or 1"
            return self._refuse("annotation", entry, place, text)
        entry["iscrowd"] = int(crowd)
        for key in ("area", "num_keypoints"):
            value = entry.get(key, 0)
            if value is None:
                del entry[key]
            elif type(value) not in (int, float) or not 0 <= value < float("inf"):
                text = f"has the {key} {shown(value)}: it needs a number, or none at all"
                return self._refuse("annotation", entry, place, text)
        return True

    def _shape(self, entry: _Entry, image: _Entry, reach: float, place: int) -> bool:
        """Leave polygons of three points and more, or an RLE; no key where there is no mask."""
        shape, wanted = entry.get("segmentation"), self.wanted.masks and not entry["iscrowd"]
        if not shape:
            entry.pop("segmentation", None)
            if wanted:
                text = "has no mask, and MODEL.MASK_ON is True"
                return self._refuse("mask", entry, place, text)
            return True
        if isinstance(shape, list):
            return self._polygons(entry, shape, reach, place)
        if not isinstance(shape, dict):
            text = f"has the segmentation {shown(shape)}, neither polygons nor an RLE"
            return self._refuse("mask", entry, place, text)
        size = (image["height"], image["width"]) if "height" in image else None
        problem = rle_problem(shape, size)
        if problem:
            return self._refuse("mask", entry, place, f"has a mask {problem}")
        if wanted and self.wanted.polygons:
            text = "has a mask that is run-length encoded: set INPUT.MASK_FORMAT bitmask"
            return self._refuse("mask", entry, place, text)
        entry["segmentation"] = compressed(shape)
        if not coco_mask.area(entry["segmentation"]):
            self._flaw("mask", entry, place, "has a mask without a pixel")
        return True

    def _polygons(self, entry: _Entry, shape: list, reach: float, place: int) -> bool:
        valid = []
        for polygon in shape:
            if not self._are_near(polygon, reach):
                text = (
                    f"has a polygon with {_culprit(polygon, reach)}: it needs finite numbers "
                    f"within {REACH} sides of the image"
                )
                return self._refuse("mask", entry, place, text)
            if len(polygon) >= 6 and len(polygon) % 2 == 0:
                valid.append(polygon)
        if len(valid) < len(shape):
            text = f"has {len(shape) - len(valid)} of {len(shape)} polygons with less than 3 points"
            self._flaw("mask", entry, place, text)
        entry["segmentation"] = valid
        return True

    def _keypoints(self, entry: _Entry, reach: float, place: int) -> bool:
        numbers = entry.get("keypoints")
        names = self.categories[entry["category_id"]].get("keypoints", ())
        # A model that learns another number of keypoints is told so before.
        learns = self.wanted.keypoints == len(names) > 0 and not entry["iscrowd"]
        if not numbers:
            entry.pop("keypoints", None)
            if learns:
                text = f"has no keypoints, and the model learns {self.wanted.keypoints}"
                return self._refuse("keypoints", entry, place, text)
            return True
        if not self._are_near(numbers, reach):
            text = (
                f"has keypoints with {_culprit(numbers, reach)}: they need finite numbers within "
                f"{REACH} sides of the image"
            )
            return self._refuse("keypoints", entry, place, text)
        text = f"has {len(numbers)} numbers for {len(names)} keypoints; it needs 3 for each"
        if len(numbers) % 3 or (learns and len(numbers) != 3 * len(names)):
            return self._refuse("keypoints", entry, place, text)
        if len(numbers) != 3 * len(names):
            self._flaw("keypoints", entry, place, text)
        return True

    def _are_near(self, numbers: Any, reach: float) -> bool:
        """Whether these are numbers within the reach; min and max see any but a NaN."""
        if not isinstance(numbers, list):
            return False
        if not numbers:
            return True
        try:
            near = -reach <= min(numbers) and max(numbers) <= reach
            return near and not (self.has_nan and any(number != number for number in numbers))
        except TypeError:
            return False


def label(number: Any, place: int, image_id: Any) -> str:
    """What a message calls an annotation, the `place`th of the file."""
    known = number if isinstance(number, str) else shown(number)
    name = f"annotation number {place}" if number is None else f"annotation {known}"
    return f"{name} of image {shown(image_id)}"


def _culprit(numbers: Any, reach: float) -> str:
    """The first that is no number within the reach."""
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if not isinstance(number, int | float) or not -reach <= number <= reach:
            return shown(number)
    return shown(numbers)


def _is_outside(box: list[float], height: int, width: int) -> bool:
    x, y, w, h = box
    return x >= width or y >= height or x + w <= 0 or y + h <= 0


# -- run-length encoded masks ----------------------------------------------------------------------
# pycocotools checks nothing: it decodes runs beyond a mask's end, and allocates what the size says.


def rle_problem(shape: Mapping[str, Any], size: Sequence[int] | None = None) -> str | None:
    """What is wrong with an RLE, compressed or not, to be read after "a mask"; None for nothing.

    Args:
        shape: {"size": [height, width], "counts": runs, or their code}.
        size: the (height, width) that it is to have; None for any.
    """
    found, counts = shape.get("size"), shape.get("counts")
    if not (isinstance(found, list | tuple) and len(found) == 2 and _are_whole(found)):
        return "without a size of [height, width]"
    if size is not None and tuple(found) != tuple(size):
        return f"of (height, width) {list(found)}; its image has {list(size)}"
    if isinstance(counts, list):
        whole = _are_whole(counts) and sum(counts) == found[0] * found[1]
    else:
        whole = is_whole(shape)
    return None if whole else "whose runs do not make up its size"


def _are_whole(numbers: Sequence[Any]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def compressed(shape: dict[str, Any]) -> dict[str, Any]:
    """An RLE without problem in its compressed form."""
    if not isinstance(shape["counts"], list):
        return shape
    return coco_mask.frPyObjects(shape, *shape["size"])


def is_whole(shape: Mapping[str, Any]) -> bool:
    """Whether the runs of a compressed RLE add up to its size."""
    try:
        (height, width), counts = shape["size"], shape["counts"]
        code = counts.encode("ascii") if isinstance(counts, str) else counts
    except (KeyError, TypeError, ValueError):
        return False
    if not (isinstance(code, bytes) and _are_whole((height, width))):
        return False
    found = runs(code)
    return len(found) > 0 and found.min() >= 0 and int(found.sum()) == height * width


def runs(code: bytes) -> np.ndarray:
    """The run lengths of a compressed RLE, int64; empty where `code` is none.

    A number is five bits a character, the lowest first, 32 marking that more follow; the last has
    its sign in bit 16. From the fourth on it is the difference from the run but one before.
    """
    bits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    last = (bits & 32) == 0
    if not len(bits) or bits.min() < 0 or bits.max() > 63 or not last[-1]:
        return np.empty(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shift = 5 * (np.arange(len(bits)) - np.repeat(starts, np.diff(starts, append=len(bits))))
    if shift.max() > 50:
        return np.empty(0, np.int64)
    values = np.add.reduceat((bits & 31) << shift, starts)
    values -= np.where(bits[last] & 16, 1 << (shift[last] + 5), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
