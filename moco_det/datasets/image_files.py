"""The images that a data set lists: whether they are there, and of the size that it says.

Asked before a run of what it will train on and be scored on. Existence is asked of all, at the
price of one listing for each folder; the size of as many as a second or two allow.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from moco_det.common.images import UnreadableImage, image_size
from moco_det.datasets.dataset import Record
from moco_det.datasets.problems import Problem, Problems, refuse_each

HEADERS = 5000  # of a data set that are read, evenly spaced; COCO's and VOC's tests have no more


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


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """`limit` of `items` at equal distances, the first and the last among them; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit <= 1:
        return list(items[:limit])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]
