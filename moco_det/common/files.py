"""Files: written whole or not at all, read only if regular; places to write to; hashes."""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from moco_det.common.errors import UserError

MAX_PIXELS = 178_956_970  # of an image, unless more are allowed; Pillow's limit
PROBE = b"\0" * 65536  # of a disk that is full
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp(\.[^.]*)?")  # the names that `replacing` gives
Item = TypeVar("Item")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, for the body to write; `path` is whole at every moment.

    After the body the file is flushed to the disk, which is where some file systems report that
    they are full, and takes its name. Where the body or the disk fails, nothing new is left in the
    folder, and an earlier file of that name stays.

    Raises:
        OSError: the file cannot be written.
        UserError: the name is that of a device or the like, which a file must not replace.
    """
    path = Path(path)
    if is_special(path):
        raise UserError(f"cannot write {path}: it is a device or the like: name a file")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def is_special(path: str | Path) -> bool:
    """Whether it is neither a file nor a folder nor free. A file that took the name of /dev/null
    would be there for all of the machine, which root is not kept from."""
    path = Path(path)
    in_dev = Path(os.path.abspath(path)).parent == Path("/dev")  # with the link stdout
    return in_dev or path.exists() and not (path.is_file() or path.is_dir())


def write_text(path: str | Path, text: str) -> None:
    """Raises OSError; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content, indent: int | None = 1) -> None:
    """Raises OSError; see `replacing`."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


class NotRegularFile(OSError):
    """What has the name is a FIFO, a device or a folder."""


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading; what else has a name (a FIFO, a device) is not waited for.

    Raises:
        NotRegularFile, or another OSError: it cannot be opened.
        ValueError: no file has such a name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularFile("it is no regular file")
    return open(descriptor, "rb")


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """The content of a regular file.

    Args:
        most: bytes that it may have; None for any number.

    Raises:
        UserError: it cannot be read, or is longer.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if most is not None and size > most:
                raise UserError(f"cannot read {path}: it has {size:,} bytes; {most:,} are allowed")
            return file.read()
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


# -- before the work ------------------------------------------------------------------------------


def make_folder(folder: str | Path, flag: str) -> Path:
    """The folder that `flag` names, made and written to once.

    Raises:
        UserError: nothing can be written there: a full disk, a read-only place, a file in the way.
    """
    folder = Path(folder)
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError as error:  # TensorBoard cannot write there
        raise UserError(f"{flag} {folder}: the name is not UTF-8: choose another one") from error
    probe = folder / f".probe.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {flag} {folder}: {error.strerror}") from error
    return folder


def check_output_file(path: str | Path, flag: str) -> None:
    """Raises UserError where the file that `flag` names could not be written."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write to {flag} {path}: it is a folder")
    if is_special(path):
        raise UserError(f"cannot write to {flag} {path}: it is a device or the like: name a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write to {flag} {path}: there is no folder {path.parent}")
    make_folder(path.parent, flag)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {flag} {path}: it is read-only")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of processes of this machine that were killed while writing."""
    for path in folder.iterdir():
        name = TEMPORARY.fullmatch(path.name)
        if name and not is_running(int(name[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def is_running(pid: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# -- which of many --------------------------------------------------------------------------------


def evenly_spaced(items: Sequence[Item], limit: int | None) -> list[Item]:
    """`limit` of `items` at equal distances, the first and the last among them; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit <= 1:
        return list(items[:limit])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


# -- what a file holds ----------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """ "sha256:..." of a file's content."""
    return _hash(path, path.stat().st_mtime_ns)


@functools.cache
def _hash(path: Path, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"
