"""What is wrong with a labelled data set: its layout, counts, missing and unreadable images.

The readers stop at the first thing that they cannot use. Here the images are looked for one by one
as well, and some are decoded.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage
from pretrain.data.benchmarks import BENCHMARKS, FOLDERS, known, read_splits
from pretrain.data.labelled import LabelledArrays, LabelledSplit, find_splits
from pretrain.data.voc_labels import find_voc

VOC = "voc2007"
NAMES = (FOLDERS, *BENCHMARKS, VOC)
VOC_IMAGES, VOC_CLASSES = (5_011, 4_952), 20  # of trainval and test, as published


@dataclass
class SplitReport:
    """One split; `problems` are (kind, text)."""

    name: str
    images: int | None = None
    published: int | None = None
    classes: int | None = None
    decoded: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


def examine_labels(name: str, data: Path, decode: int | None) -> list[SplitReport]:
    """Each split of DATA.

    Args:
        name: one of NAMES.
        decode: images of each split that are decoded, evenly spaced; None for all.
    """
    try:
        found = _find(name, data)
    except UserError as error:
        return [SplitReport(f"{name}: {data}", problems=[("layout", str(error))])]
    pairs = zip(found.splits, found.published_images, strict=True)
    return [_examine(found, split, images, decode) for split, images in pairs]


@dataclass(frozen=True)
class Found:
    """The splits of a data set and how many classes it has; the published numbers, if any are."""

    splits: list[LabelledSplit]
    classes: int
    published_images: tuple[int | None, ...] = (None, None)
    published_classes: int | None = None


def _find(name: str, data: Path) -> Found:
    if name == VOC:
        classes, *labels = find_voc(data, "trainval", "test")
        splits = [split.images for split in labels]
        return Found(splits, len(classes), VOC_IMAGES, VOC_CLASSES)
    if name == FOLDERS:
        classes, *splits = find_splits(data)
        return Found(splits, len(classes))
    benchmark = known(name)
    classes, *splits = read_splits(benchmark, data)
    return Found(splits, len(classes), benchmark.images, benchmark.classes)


def _examine(
    found: Found, split: LabelledSplit, published: int | None, decode: int | None
) -> SplitReport:
    report = SplitReport(split.name, len(split.paths), published, found.classes)
    if found.published_classes not in (None, found.classes):
        text = f"{found.classes}; published are {found.published_classes}"
        report.problems.append(("classes", text))
    if published is not None and report.images != published:
        report.problems.append(("count", f"{report.images} images; published are {published}"))
    present = np.arange(len(split.paths))
    if not isinstance(split, LabelledArrays):
        there = np.array([os.path.isfile(split.file(index)) for index in present], bool)
        absent, present = present[~there], present[there]
        report.problems += [("missing", f"{split.file(i)} does not exist") for i in absent]
    chosen = present
    if decode is not None and decode < len(present):
        chosen = present[np.linspace(0, len(present) - 1, decode).round().astype(int)]
    report.decoded = len(chosen)
    report.problems += [("image", text) for text in _unreadable(split, chosen)]
    return report


def _unreadable(split: LabelledSplit, indices: np.ndarray) -> Iterator[str]:
    def problem(index: int) -> str:
        try:
            split.read(index)
        except UnreadableImage as error:
            return f"{error.name} cannot be decoded: {error.reason}"
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        yield from filter(None, threads.map(problem, indices.tolist()))
