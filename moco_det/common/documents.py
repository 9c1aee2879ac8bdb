"""YAML and JSON that nobody here wrote: read whole and checked, or refused in one line.

One reader for each of the two, used by every command. They open regular files only, look at the
size first, and bound what a small file can become: depth, what aliases repeat, digits of a number.
What a document means is its user's to check.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import yaml

from moco_det.common.errors import UserError, one_line
from moco_det.common.files import open_regular

MOST_YAML = 1 << 18  # bytes; Detectron2's longest configs have a hundredth
MOST_NODES = 100_000  # of a YAML file, with what its aliases repeat
MOST_JSON = 1 << 30  # bytes
DEEPEST = 50
LARGEST = 2**63 - 1  # an integer


# -- words of a message ---------------------------------------------------------------------------


def shown(value: object, most: int = 60) -> str:
    """A value of a file as a message may show it."""
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):  # thousands of digits, deep nesting
        return f"a {type(value).__name__}"


# -- bytes ----------------------------------------------------------------------------------------


def _read(path: str | Path, what: str, most: int) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise UserError(
                    one_line(f"{what} {path} has {size:,} bytes; at most {most:,} are read")
                )
            return file.read()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {what} {shortened(path)}: {reason}") from error
    except (ValueError, MemoryError) as error:
        raise UserError(f"cannot read {what} {shortened(path)}: {error}") from error


def shortened(path: str | Path) -> str:
    """A path as a message may show it."""
    return one_line(path, 200)


# -- YAML -----------------------------------------------------------------------------------------

_YAML = "tag:yaml.org,2002:"
_KINDS = {
    f"{_YAML}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
}


def read_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file: dicts, lists, strings, numbers, booleans and None.

    Args:
        what: the file is to the command, such as "config", for messages.

    Raises:
        UserError: the file cannot be read or is no YAML; it is larger, deeper or repeats more than
            any config; a value that YAML 1.1 reads as something else than it looks (a date, a
            number of base 60), a number of more than 64 bits, an object of Python's.
    """
    path = Path(path)
    try:
        text = _read(path, what, MOST_YAML).decode("utf-8-sig")
        loader = _CheckedLoader(text, f"{what} {shortened(path)}")
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark else ""
        reason = one_line(error.problem or error.context or "", 120)
        message = f"{what} {shortened(path)} is not valid YAML: {place}{reason}"
        raise UserError(one_line(message)) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        # ValueError: what looks like a number, and is none.
        message = f"{what} {shortened(path)} is not valid YAML: {one_line(error, 120)}"
        raise UserError(one_line(message)) from error


class _CheckedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a node as soon as it is composed, before any value is made of it.

    Args:
        where: the file, for messages.
    """

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self._where = where
        self._path: list[str] = []  # keys and places that lead to the node at hand
        self._measures: dict[int, tuple[int, int]] = {}  # id of a node -> (nodes, levels)
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        """See yaml.composer.Composer: `index` is the key of a value, or the place of an item."""
        event = self.peek_event()
        named = isinstance(index, yaml.ScalarNode | int)
        if named:
            self._path.append(index.value if isinstance(index, yaml.ScalarNode) else str(index))
        self._count += 1
        if len(self._path) > DEEPEST:
            self._refuse(event, f"is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self._count_alias(event, node)
        else:
            self._check(node)
            self._measures[id(node)] = self._measure(node)
        if self._count > MOST_NODES:
            self._refuse(event, f"makes more than {MOST_NODES:,} values of this file")
        if named:
            self._path.pop()
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        else:
            below = node.value
        measures = [self._measures[id(part)] for part in below]
        return 1 + sum(n for n, _ in measures), 1 + max((d for _, d in measures), default=0)

    def _count_alias(self, event: yaml.Event, node: yaml.Node) -> None:
        if id(node) not in self._measures:  # it is not whole yet
            self._refuse(event, "contains itself (an alias within its own anchor)")
        nodes, levels = self._measures[id(node)]
        self._count += nodes
        if len(self._path) + levels > DEEPEST:
            self._refuse(event, f"is nested more than {DEEPEST} levels deep")

    def _check(self, node: yaml.Node) -> None:
        if node.tag == f"{_YAML}timestamp":
            self._refuse(node, f"{shown(node.value)} is a date to YAML: write it in quotes")
        if node.tag not in _KINDS:
            tag = one_line(node.tag.replace(_YAML, "!!"), 60)
            self._refuse(node, f"{tag} is not supported: write the value itself")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        value = node.value
        if "\0" in value:
            self._refuse(node, "holds a NUL character")
        if node.tag in (f"{_YAML}int", f"{_YAML}float"):
            if ":" in value:
                self._refuse(
                    node, f"{shown(value)} is a number of base 60 to YAML: write it in quotes"
                )
            if len(value) > 100:
                self._refuse(node, f"has {len(value):,} digits")
        if node.tag == f"{_YAML}int" and abs(self.construct_yaml_int(node)) > LARGEST:
            self._refuse(node, f"{shown(value)} has more than 64 bits")

    def _refuse(self, at: yaml.Node | yaml.Event, reason: str) -> None:
        place = [f"{self._where}, line {at.start_mark.line + 1}", ".".join(self._path)[:60]]
        raise UserError(one_line(": ".join([*filter(None, place), reason])))


def read_mapping(path: str | Path, what: str) -> dict:
    """The mapping in a YAML file, empty for an empty file; else see `read_yaml`."""
    content = read_yaml(path, what)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{what} {shortened(path)} must map keys to values")
    return content


# -- JSON -----------------------------------------------------------------------------------------


def read_json(path: str | Path, what: str, most: int = MOST_JSON, finite: bool = True) -> Any:
    """The content of a JSON file; a byte order mark is passed over.

    Args:
        what: the file is to the command, such as "the record", for messages.
        most: bytes that it may have.
        finite: refuse NaN and infinite numbers, which are none of JSON's.

    Raises:
        UserError: the file cannot be read or is no JSON; it is nested too deeply, or has a number
            of more than 64 bits.
    """
    data = _read(path, what, most)
    try:
        return _decoded(data, finite)
    except ValueError as error:
        reason = one_line(error, 100)
        raise UserError(
            f"cannot read {what} {shortened(path)}: it is not JSON ({reason})"
        ) from error


def read_json_lines(
    path: str | Path, what: str, finite: bool = True, kind: str = "an object"
) -> list[dict[str, Any]]:
    """The objects of a file with one a line; half a last line is none.

    A kill cuts a line short, and a crash of the machine may leave NUL bytes where it was to be.
    `kind`: what a line is, for messages; otherwise as `read_json`.

    Raises:
        UserError: as `read_json`, with the number of the line, or a line is no object.
    """
    lines = _read(path, what, MOST_JSON).split(b"\n")
    if not _is_whole(lines[-1]):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = _decoded(line, finite)
            if not isinstance(content, dict):
                raise ValueError(f"{shown(content)} is no object")
        except ValueError as error:
            where = f"{what} {shortened(path)}, line {number}"
            raise UserError(f"{where} is no JSON of {kind} ({one_line(error, 80)})") from error
        found.append(content)
    return found


def mend_last_line(path: str | Path) -> None:
    """Drop half a last line, and end a whole one: the next line is about to be appended.

    Raises:
        OSError: the file cannot be changed.
    """
    if not Path(path).is_file():
        return
    with open(path, "rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if _is_whole(content[end:]):
            file.write(b"\n")
        elif end < len(content):
            file.truncate(end)


def _is_whole(line: bytes) -> bool:
    """Whether a last line without its end is all of an object; half of one never is."""
    try:
        return isinstance(_decoded(line, finite=False), dict)
    except ValueError:
        return False


def _decoded(data: bytes, finite: bool) -> Any:
    """ValueError where it is no JSON, or too deep."""
    numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_int=_integer, **numbers)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(content)
    return content


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"the number {shown(text)} has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _check_depth(content: Any) -> None:
    """ValueError where lists and dicts lie deeper in each other than `DEEPEST`."""
    level = [[content]]
    for _ in range(DEEPEST + 1):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")
