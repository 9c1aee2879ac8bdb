"""What was found in one data set, and how it is printed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_det.datasets import BuiltIn, Problem, Problems, data_root
from moco_det.datasets.problems import one_line


@dataclass
class Report(Problems):
    """What the readers find in one data set, collected.

    `images` and `objects`: how many are listed; None where that could not be found out.

    `official`: what the set should hold, if it is an official one. `notes` are worth knowing but
    not problems.
    """

    name: str
    official: BuiltIn | None = None
    images: int | None = None
    objects: int | None = None
    classes: int | None = None
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: set[Problem] = field(default_factory=set, repr=False)

    @property
    def remedy(self) -> str:
        """What to download from whom, and where to put it; "" for a user's own data."""
        if self.official is None:
            return ""
        root = data_root()
        parts = (
            f"{', '.join(source.files)} from {source.site}: {source.placing.format(root=root)}"
            for source in self.official.sources
        )
        return (
            f"download {'; '.join(parts)}. {root} is the data root; DETECTRON2_DATASETS names "
            "another"
        )

    def refuse(self, check: str, text: object) -> None:
        """Add a problem, unless it is known: classes and records are read from the same files."""
        problem = Problem(check, one_line(text))
        if problem not in self.known:
            self.known.add(problem)
            self.problems.append(problem)

    flaw = refuse

    def repeated(self, ids: dict[Any, int]) -> None:
        if ids and self.official and self.official.repeats:
            self.note(f"{len(ids)} annotations are listed more than once, as in the official file")
            return
        for annotation_id, times in ids.items():
            self.refuse("list", f"annotation {annotation_id} is listed {times} times")

    def note(self, text: object) -> None:
        self.notes.append(one_line(text))

    def listed(self, images: int, objects: int | None = None) -> None:
        self.images, self.objects = images, objects

    def lacks(self, paths: Iterable[Path]) -> bool:
        """Report each of `paths` that does not exist; return whether any is missing."""
        missing = [path for path in paths if not path.exists()]
        for path in missing:
            self.refuse("layout", f"{path} does not exist")
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
        (
            report.name,
            report.images,
            report.official and report.official.images,
            report.objects,
            report.classes,
            report.decoded,
            len(report.problems) or "none",
        )
        for report in reports
    ]
    return tabulate(rows, headers, "pipe", missingval="-", colalign=("left",) + ("right",) * 6)
