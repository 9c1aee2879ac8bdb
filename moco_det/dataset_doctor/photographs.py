"""Photographs: there, readable, and of the size that their annotation says."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from moco_det.dataset_doctor.report import Report

_EXIF_ORIENTATION = 0x0112
_ON_ITS_SIDE = 5  # and above: the stored rows are the columns of what is seen


@dataclass(frozen=True)
class Photograph:
    """`size`: (height, width) of the annotation; None where it gives none."""

    path: Path
    size: tuple[int, int] | None = None


def check_photographs(report: Report, photographs: Sequence[Photograph], limit: int | None) -> None:
    """Look for all of them; decode `limit`, spread evenly over the set (None: all)."""
    present = [photograph for photograph in photographs if photograph.path.is_file()]
    if photographs and not present:
        first = photographs[0].path
        report.problem(
            "layout", f"none of the {len(photographs):,} images exists; expected {first}"
        )
        return
    if len(present) < len(photographs):
        there = {photograph.path for photograph in present}
        for photograph in photographs:
            if photograph.path not in there:
                report.problem("image", f"{photograph.path} does not exist")
    chosen = spread(present, limit)
    report.decoded = len(chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        problems = threads.map(_problem, chosen)
        for check, text in filter(None, problems):
            report.problem(check, text)


def spread(items: Sequence, limit: int | None) -> list:
    """`limit` of `items` at equal distances, the first and the last among them; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit <= 1:
        return list(items[:limit])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _problem(photograph: Photograph) -> tuple[str, str] | None:
    try:
        size = _decoded_size(photograph.path)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        return "image", f"{photograph.path} cannot be decoded: {error}"
    if photograph.size in (None, size):
        return None
    (height, width), (h, w) = photograph.size, size
    text = f"{photograph.path} is {w}x{h} pixels, its annotation says {width}x{height}"
    return "size", text


def _decoded_size(path: Path) -> tuple[int, int]:
    """(height, width) of all the decoded pixels, turned upright as training does."""
    with Image.open(path) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        image.load()
        size = image.height, image.width
    return size[::-1] if orientation >= _ON_ITS_SIDE else size
