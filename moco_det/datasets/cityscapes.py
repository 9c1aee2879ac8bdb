"""Cityscapes, instances of 8 classes, from the label maps `*_gtFine_instanceIds.png`.

Below $DETECTRON2_DATASETS, in Detectron2's layout, cityscapes_fine_instance_seg_{train,val}; or
`cityscapes:ROOT:SPLIT` in a folder of its own:
    cityscapes/leftImg8bit/SPLIT/CITY/ID_leftImg8bit.png
    cityscapes/gtFine/SPLIT/CITY/ID_gtFine_instanceIds.png

Why from the maps, where Detectron2 by default starts from `*_gtFine_polygons.json`: the maps are
what the official evaluation compares with. The polygons lie over one another in the order of their
drawing; Detectron2 cuts them, with shapely, to what is visible and fills their holes. The maps are
the result of that same drawing, exact to the pixel, need no further package, and are part of every
release of gtFine (`cityscapesscripts.preparation.json2instanceImg` makes them of polygons, with
Pillow below 13). So masks are run-length encoded: training needs INPUT.MASK_FORMAT bitmask.

A pixel's number is labelId * 1000 + n in the nth object of a class, and labelId in a group of
objects that could not be told apart, which is a crowd here. A box goes around all pixels of its
object, from the left edge of the first column to the right edge of the last. So do the boxes that
Detectron2 makes of the polygons, to a hundredth of a pixel; those that it makes of the maps end a
pixel earlier.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.common.images import read_label_map
from moco_det.datasets.dataset import (
    NOTHING,
    Dataset,
    Record,
    SplitLayout,
    Wanted,
)
from moco_det.datasets.problems import Problems

# Class -> labelId, in the order of the trainIds (cityscapesscripts.helpers.labels), which is
# Detectron2's. Caravan and trailer, 29 and 30, are not evaluated.
# fmt: off
LABEL_IDS = {
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}
# fmt: on
_CLASS_OF = {label: index for index, label in enumerate(LABEL_IDS.values())}
LAST_LABEL = 33

IMAGE = "_leftImg8bit.png"


class CityscapesLayout(SplitLayout):
    """A split of Cityscapes' folders.

    `label_endings`: the ends of its maps' names, the one that is preferred first.
    """

    label_endings: ClassVar[tuple[str, ...]]

    @property
    def required(self) -> tuple[Path, ...]:
        return self.image_dir, self.label_dir

    @property
    def image_dir(self) -> Path:
        return self.root / "leftImg8bit" / self.split

    @property
    def label_dir(self) -> Path:
        return self.root / "gtFine" / self.split

    def files(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """ "CITY/ID" -> the image, and "CITY/ID" -> its label map."""
        maps = {}
        for ending in reversed(self.label_endings):
            maps |= _by_city(self.label_dir, ending)
        return _by_city(self.image_dir, IMAGE), maps

    def image_path(self, stem: str) -> Path:
        """Where the image "CITY/ID" belongs."""
        return Path(f"{self.image_dir / stem}{IMAGE}")

    def label_paths(self, stem: str) -> str:
        """Where the label map of the image "CITY/ID" may be."""
        paths = (f"{self.label_dir / stem}{ending}" for ending in self.label_endings)
        return " or ".join(paths)

    def pairs(self, problems: Problems | None = None) -> list[tuple[str, Path, Path]]:
        """(image id, image, label map), sorted by image id, "CITY_SEQUENCE_FRAME".

        Raises:
            UserError: an image without a label map, or the reverse; none at all.
        """
        problems = problems or Problems()
        images, maps = self.files()
        problems.listed(len(images))
        if not images and not maps:
            text = f"dataset {self.name}: no CITY/*{self.label_endings[-1]} in {self.label_dir}"
            problems.refuse("list", text)
        for check, found, others, expected, what in (
            ("labels", images, maps, self.label_paths, "images have no label map"),
            ("image", maps, images, self.image_path, "label maps have no image"),
        ):
            alone = sorted(found.keys() - others.keys())
            for stem in alone[:1]:
                text = f"{len(alone)} {what}, the first is {found[stem]}"
                problems.refuse(check, f"{text}: expected {expected(stem)}, which does not exist")
            for stem in alone[1:]:
                problems.refuse(check, f"{expected(stem)} does not exist")
        both = images.keys() & maps.keys()
        pairs = [(Path(stem).name, images[stem], maps[stem]) for stem in both]
        return sorted(pairs)


def _by_city(folder: Path, ending: str) -> dict[str, Path]:
    """ "CITY/ID" -> the file FOLDER/CITY/ID + ending."""
    paths = folder.glob(f"*/*{ending}")
    return {str(path.relative_to(folder)).removesuffix(ending): path for path in paths}


@dataclass(frozen=True)
class CityscapesDataset(CityscapesLayout, Dataset):
    """Instances of a split of Cityscapes' layout."""

    evaluator: ClassVar[str] = "cityscapes"
    all_classes: ClassVar[tuple[str, ...]] = tuple(LABEL_IDS)
    label_endings: ClassVar[tuple[str, ...]] = ("_gtFine_instanceIds.png",)
    root: Path
    split: str

    def records(self, problems: Problems | None = None, wanted: Wanted = NOTHING) -> list[Record]:
        """As in `Dataset`, sorted by image id.

        An annotation also has "segmentation", a compressed RLE. The 2,975 maps of the training set
        are two to four minutes' work of one core, so several threads read them, and a process reads
        each once as long as it does not change.

        Raises:
            UserError: an image without a map, or the reverse; a map that cannot be read or is
                none; no image at all.
        """
        pairs = self.pairs(problems)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return list(threads.map(read_record, pairs))


_Object = tuple[int, int, bytes]  # number in the map, class, run lengths


def _annotation(number: int, label: int, counts: bytes, size: tuple[int, int]) -> dict[str, Any]:
    shape = {"size": list(size), "counts": counts}
    x, y, width, height = coco_mask.toBbox(shape).tolist()
    return {
        "bbox": [x, y, x + width, y + height],
        "category_id": label,
        "iscrowd": int(number < 1000),
        "segmentation": shape,
    }


def read_record(pair: tuple[str, Path, Path]) -> Record:
    """Of (image id, image, label map).

    Raises:
        UserError: the map cannot be read, is none of instances, or has a label that there is not.
    """
    image_id, image, labels = pair
    height, width, objects = read_instances(labels)
    return {
        "file_name": str(image),
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": [_annotation(*found, (height, width)) for found in objects],
    }


def read_instances(path: Path) -> tuple[int, int, tuple[_Object, ...]]:
    """(height, width, objects of the 8 classes) of a map; raises as `read_record`."""
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return _parse(path, (state.st_mtime_ns, state.st_size))


@functools.cache
def _parse(path: Path, state: tuple[int, int]) -> tuple[int, int, tuple[_Object, ...]]:
    """Kept for each state of a file: a run reads its data sets several times."""
    numbers = read_instance_ids(path)
    height, width = numbers.shape
    objects = []
    for number, counts in run_lengths(numbers).items():
        label = number // 1000 if number >= 1000 else number
        if label > LAST_LABEL:
            raise UserError(
                f"{path} holds the number {number}, which is of label {label}; Cityscapes' labels "
                f"are 0 to {LAST_LABEL}"
            )
        if label in _CLASS_OF:
            shape = coco_mask.frPyObjects(
                {"size": [height, width], "counts": counts}, height, width
            )
            objects.append((number, _CLASS_OF[label], shape["counts"]))
    return height, width, tuple(objects)


def read_instance_ids(path: Path) -> np.ndarray:
    """The map as int64 (H, W)."""
    mode, numbers = read_label_map(path)
    if not mode.startswith("I"):
        raise UserError(
            f"{path} is of Pillow's mode {mode}: a map of instances has one channel of 16 bits"
        )
    return numbers


def run_lengths(numbers: np.ndarray) -> dict[int, list[int]]:
    """COCO's uncompressed runs (0s, 1s, 0s, ..., down the columns) of each number in (H, W).

    All in one pass over the image: about three times as fast as a mask for each number.
    """
    flat = numbers.T.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], starts])
    values, ends = flat[starts], np.append(starts[1:], flat.size)
    runs = {}
    for value in np.unique(values):
        mine = values == value
        edges = np.stack([starts[mine], ends[mine]], axis=1).ravel()
        runs[int(value)] = np.diff(edges, prepend=0, append=flat.size).tolist()
    return runs
