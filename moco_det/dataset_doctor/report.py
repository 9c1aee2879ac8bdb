"""What was found in one data set, and how it is said.

Photographs: there, readable, and of the size that their annotation says.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tabulate import tabulate


class Problem(NamedTuple):
    """`check`: the kind of it, one word; `text`: names the file, and what is wrong with it."""

    check: str
    text: str


@dataclass
class Report:
    """`images` and `objects`: how many are listed; None where that could not be found out.

    `expected`: how many images the official set has. `notes` say what is no problem but good to
    know; `remedy` what to download and where to put it, where that is known.
    """

    name: str
    images: int | None = None
    objects: int | None = None
    classes: int | None = None
    expected: int | None = None
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    remedy: str = ""

    def problem(self, check: str, text: object) -> None:
        self.problems.append(Problem(check, str(text)))

    def lacks(self, paths: Iterable[Path]) -> bool:
        """Report each of `paths` that does not exist; whether there is one."""
        missing = [path for path in paths if not path.exists()]
        for path in missing:
            self.problem("layout", f"{path} does not exist")
        return bool(missing)


def describe(report: Report, listed: int) -> str:
    """The problems by kind, at most `listed` of each kind (0: all), the remedy and the notes."""
    lines = [f"{report.name}: {len(report.problems)} problem(s)"]
    for check in dict.fromkeys(problem.check for problem in report.problems):
        texts = [problem.text for problem in report.problems if problem.check == check]
        shown = texts[: listed or None]
        lines += [f"  {check}: {text}" for text in shown]
        if len(texts) > len(shown):
            lines.append(f"  {check}: and {len(texts) - len(shown)} more")
    if report.problems and report.remedy:
        lines.append(f"  remedy: {report.remedy}")
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)


def table(reports: Sequence[Report]) -> str:
    """One row for each data set; - for what could not be found out or has no official number."""
    headers = ["data set", "images", "official", "objects", "classes", "decoded", "problems"]
    rows = [
        (r.name, r.images, r.expected, r.objects, r.classes, r.decoded, len(r.problems) or "none")
        for r in reports
    ]
    return tabulate(rows, headers, "pipe", missingval="-", colalign=("left",) + ("right",) * 6)


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
