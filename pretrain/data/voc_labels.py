"""Which classes the images of VOC show: the labels of its classification task, several an image.

They are read from the lists ImageSets/Main/CLASS_SPLIT.txt, whose lines are an image and 1, -1 or
0; 0 where all objects of the class are difficult. Where the data set has no such lists, they are
made of its XML files by the same rule.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from moco_det.common.documents import shown
from moco_det.common.errors import UserError
from moco_det.common.files import read_regular
from pretrain.data.labelled import LabelledSplit
from pretrain.data.listing import read_lines, seen_alike

PRESENT, ABSENT, DIFFICULT = 1, -1, 0  # as the lists have it
PLACES = ("", "VOC2007", "VOCdevkit/VOC2007")  # of ImageSets/ and JPEGImages/ in DATA
HOME = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
_IMAGE = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)
_MOST_XML = 2**24  # bytes


@dataclass(frozen=True)
class VocLabels:
    """The images of a split and what they show.

    Args:
        images: whose labels are their own numbers.
        labels: PRESENT, ABSENT or DIFFICULT, M x C, int8.
    """

    images: LabelledSplit
    labels: np.ndarray


def find_voc(data: Path, train: str, test: str) -> tuple[list[str], VocLabels, VocLabels]:
    """Sorted names of the C classes, and two splits. Collective.

    Args:
        data: the folder that has ImageSets/ and JPEGImages/, or one of PLACES below it.
        train, test: names of the splits.

    Raises:
        UserError: a folder, a list or an image is not there, or no list.
    """
    return seen_alike(
        lambda: _find_voc(data, train, test),
        lambda found: [split.images.fingerprint | _summed(split.labels) for split in found[1:]],
    )


def _summed(labels: np.ndarray) -> dict:
    return {"labels": [int((labels == value).sum()) for value in (PRESENT, ABSENT, DIFFICULT)]}


def _find_voc(data: Path, train: str, test: str) -> tuple[list[str], VocLabels, VocLabels]:
    roots = [data / place for place in PLACES]
    root = next((r for r in roots if (r / "ImageSets" / "Main").is_dir()), None)
    if root is None:
        raise UserError(
            f"no VOC in {data}: it needs ImageSets/Main/ and JPEGImages/, in it or in VOC2007/ or "
            f"VOCdevkit/VOC2007/ (from {HOME}: VOCtrainval and VOCtest, unpacked in one place)"
        )
    if not (root / "JPEGImages").is_dir():
        raise UserError(f"{root} lacks the folder JPEGImages")
    by_class = [_read_lists(root, split) for split in (train, test)]
    if any(by_class):
        classes = _agreeing_classes(root, *by_class, train, test)
    else:
        by_class = [_read_xml(root, split) for split in (train, test)]
        classes = sorted({name for image_of in by_class for name in image_of if name})
    if not classes:
        raise UserError(f"{root}/Annotations name no object of an image of {train} or {test}")
    splits = zip((train, test), by_class, strict=True)
    return classes, *(_labels(root, split, classes, found) for split, found in splits)


def _agreeing_classes(root: Path, ours: Mapping, theirs: Mapping, train: str, test: str):
    """The classes that both splits have lists of."""
    lists = root / "ImageSets" / "Main"
    for one, other, split in ((ours, theirs, test), (theirs, ours, train)):
        lacking = sorted(one.keys() - other.keys())
        if lacking:
            raise UserError(
                f"{lists} lacks {lacking[0]}_{split}.txt"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + f": unpack all of VOC there (from {HOME})"
            )
    return sorted(ours)


# Class -> image -> label; the class "" lists the images of a split without objects.
ByClass = dict[str, dict[str, int]]


def _read_lists(root: Path, split: str) -> ByClass:
    """What the lists CLASS_SPLIT.txt say; {} without any."""
    found = {}
    for path in sorted((root / "ImageSets" / "Main").glob(f"[!.]*_{split}.txt")):
        found[path.name.removesuffix(f"_{split}.txt")] = labels = {}
        for line in read_lines(path):
            image, *label = line.split()
            if len(label) != 1 or label[0] not in ("1", "-1", "0"):
                raise UserError(f"{path}: a line is an image and 1, -1 or 0, not {shown(line)}")
            labels[image] = int(label[0])
    return found


def _read_xml(root: Path, split: str) -> ByClass:
    """The same of the XML files of the images that SPLIT.txt lists."""
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"there is neither {listing} nor a CLASS_{split}.txt beside it")
    found: ByClass = {"": {}}
    for line in read_lines(listing):
        image = _IMAGE.sub("", line.split()[0])
        found[""][image] = ABSENT
        for name, difficult in _objects(root / "Annotations" / f"{image}.xml"):
            labels = found.setdefault(name, {})
            if not difficult:
                labels[image] = PRESENT
            labels.setdefault(image, DIFFICULT)
    return found


def _objects(path: Path) -> list[tuple[str, bool]]:
    """(class, whether difficult) of each object."""
    try:
        root = ElementTree.fromstring(read_regular(path, _MOST_XML))
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path} is no XML: {error}") from error
    names = [(node.findtext("name") or "").strip() for node in root.findall("object")]
    if not all(names):
        raise UserError(f"{path}: an <object> lacks a <name>")
    difficult = [(node.findtext("difficult") or "").strip() == "1" for node in root.iter("object")]
    return list(zip(names, difficult, strict=True))


def _labels(root: Path, split: str, classes: list[str], by_class: ByClass) -> VocLabels:
    images = sorted({image for labels in by_class.values() for image in labels})
    if not images:
        raise UserError(f"{root}/ImageSets/Main lists no image of {split}")
    number = {image: index for index, image in enumerate(images)}
    labels = np.full((len(images), len(classes)), ABSENT, dtype=np.int8)
    for column, name in enumerate(classes):
        for image, label in by_class.get(name, {}).items():
            labels[number[image], column] = label
    there = {path.stem: path.name for path in sorted((root / "JPEGImages").iterdir(), reverse=True)}
    absent = [image for image in images if image not in there]
    if absent:
        raise UserError(
            f"{root / 'JPEGImages'} lacks {len(absent)} image(s) of {split}: {absent[0]}.jpg"
        )
    paths = [f"JPEGImages/{there[image]}" for image in images]
    name = f"{split} of {root}"
    return VocLabels(LabelledSplit(name, root, paths, np.arange(len(paths))), labels)
