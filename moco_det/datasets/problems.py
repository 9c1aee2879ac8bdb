"""What a reader of annotations finds wrong: the first of it ends a run, the doctor lists it all.

Each kind of file has one reader, and a reader tells a `Problems` what it finds. Training and
scoring hand it one that raises; that of the doctor, its `Report`, collects. So the doctor finds
what a run would stumble over, and nothing else. Drawing goes on without what cannot be used.
"""

import sys
from typing import Any, NamedTuple

from moco_det.common import errors
from moco_det.common.errors import UserError

MOST_ALIKE = 1000  # problems that are told one by one
LONGEST = 390  # characters of a message; values of files are shown in 60
LONGEST_NAME = 255  # of a file or a folder, in the file systems that are common


class Problem(NamedTuple):
    """`check`: its kind, in a word or two; `text` names the place and what is wrong with it."""

    check: str
    text: str


class DatasetError(UserError):
    """A data set that cannot be used; `check`: the kind of its problem, see `Problem`."""

    def __init__(self, check: str, text: str):
        super().__init__(text)
        self.check = check


class Problems:
    """Raises at the first thing that cannot be used, and passes over what is left out.

    Args:
        file: what the messages begin with; None where they name their files themselves.
    """

    def __init__(self, file: object = None):
        self.file = file

    def refuse(self, check: str, text: object) -> None:
        """Something that cannot be used; a reader goes on after it where it can.

        Raises:
            DatasetError: here; not where problems are collected.
        """
        text = one_line(text)
        if self.file is not None:
            room = errors.LONGEST - len(f"error: : {text}")
            text = f"{errors.one_line(self.file, max(60, room))}: {text}"
        raise DatasetError(check, text)

    def flaw(self, check: str, text: object) -> None:
        """Something that a run leaves out, or does without."""

    def repeated(self, ids: dict[Any, int]) -> None:
        """Annotations that a file lists more than once: id -> times."""

    def note(self, text: object) -> None:
        """Something worth knowing."""

    def listed(self, images: int, objects: int | None = None) -> None:
        """How many the files list, whatever is wrong with them."""


class SkippedProblems(Problems):
    """Prints what cannot be used, which is then left out, and raises nothing: for drawing."""

    most = 20  # lines

    def __init__(self, file: object = None):
        super().__init__(file)
        self.count = 0

    def refuse(self, check: str, text: object) -> None:
        self.count += 1
        if self.count <= self.most:
            print(f"skipped: {one_line(text)}", file=sys.stderr, flush=True)
        if self.count == self.most:
            print("skipped: and more; tools/check_data.py lists all", file=sys.stderr, flush=True)


def refuse_each(check: str, texts: list[str], problems: Problems) -> None:
    """Refuse each of many files that are alike; beyond `MOST_ALIKE` only their number is told."""
    for text in texts[:MOST_ALIKE]:
        problems.refuse(check, text)
    if len(texts) > MOST_ALIKE:
        problems.refuse(check, f"and {len(texts) - MOST_ALIKE:,} more, {len(texts):,} in all")


def one_line(text: object) -> str:
    """A message as it is told: see `errors.one_line`; paths make these longer than others."""
    return errors.one_line(text, LONGEST)


def shown(value: object, most: int = 60) -> str:
    """A value of a file as a message may show it."""
    if isinstance(value, list | dict) and len(value) > most:
        kind = "list" if isinstance(value, list) else "object"
        return f"a {kind} of {len(value):,} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, deep nesting
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."
