"""Which images there are, below a folder or in a list, and whether all who count them see the same.

Batches are slices of a list of names. So every process must have found the same list, and a run
that goes on within an epoch the list that the epoch was begun with.
"""

import codecs
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from moco_det.common.documents import shortened, shown
from moco_det.common.errors import UserError, one_line
from moco_det.common.files import read_regular, replacing
from moco_det.common.processes import all_objects, print_on_main

Found = TypeVar("Found")
MOST_LIST = 1 << 31  # bytes of a list; ImageNet's has 2 % of it

# -- below a folder -------------------------------------------------------------------------------


def find_images(folder: Path) -> np.ndarray:
    """Sorted paths, relative to `folder`, of all images below it; links are followed.

    What is hidden, its name beginning with a dot, is left out: thumbnails of notebooks and what
    macOS keeps beside each file. Of several ways into one folder the first counts.

    A byte array rather than a list of str: forked workers then share the memory of 10^6 paths
    instead of copying it piece by piece as reference counts change.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (DATA is a folder of images)")
    left_out: list[str] = []
    paths = []
    for parent, names in _folders(folder, left_out):
        images = [os.path.join(parent, name) for name in names if is_image_file(name)]
        hidden = [path for path in images if _is_hidden(os.path.basename(path))]
        left_out += hidden
        paths += sorted(set(images).difference(hidden)) if hidden else images
    _say_left_out(str(folder), len(left_out), min(left_out, default=""))
    if not paths:
        hint = f"; for its shards pass '{folder}/*.tar'" if any(folder.glob("*.tar")) else ""
        raise UserError(f"no images below {folder} (looked for {', '.join(IMG_EXTENSIONS)}){hint}")
    return np.array(sorted(map(os.fsencode, paths)), dtype=np.bytes_)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`; none where it is no folder itself.

    Hidden ones are left out, and links that lead back to where they are.
    """
    if not folder.is_dir():
        return []
    real = folder.resolve()
    try:
        return sorted(
            path.name
            for path in folder.iterdir()
            if path.is_dir()
            and not _is_hidden(path.name)
            and not (path.is_symlink() and real.is_relative_to(path.resolve()))
        )
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror}") from error


def _folders(root: Path, left_out: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(folder, names in it) for `root` and all below, each real folder once; relative to `root`.

    Links come after all that can be reached without them, in the order of their names, so that a
    folder within the data keeps its own name. `left_out` gets what is not entered.
    """

    def fail(error: OSError):
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    entered, starts = set(), [str(root)]
    while starts:
        for parent, folders, names in os.walk(starts.pop(0), onerror=fail):
            status, place = os.stat(parent), os.path.relpath(parent, root)
            place = "" if place == os.curdir else place
            if (status.st_dev, status.st_ino) in entered:
                left_out.append(place)
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            left_out += (os.path.join(place, name) for name in folders if _is_hidden(name))
            folders[:] = [name for name in folders if not _is_hidden(name)]
            links = (os.path.join(parent, name) for name in folders)
            starts = sorted([*starts, *filter(os.path.islink, links)])
            yield place, names


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


@cache  # once a run, however often a folder is listed
def _say_left_out(folder: str, count: int, one: str) -> None:
    if count:
        print_on_main(
            f"left out below {folder}: {count} that are hidden, or links to folders that are read "
            f"already; one of them: {one}"
        )


# -- in a list ------------------------------------------------------------------------------------


def read_list(file: Path, folder: Path) -> np.ndarray:
    """Sorted paths of the images in a text file, one a line: relative to `folder`, or absolute.

    Empty lines are passed over. Paths below `folder` are relative in what is returned, however they
    are written, so that only the set of images counts.

    Raises:
        UserError: it names no image, one twice, or one that is absent.
    """
    content = read_regular(file, MOST_LIST)
    if b"\0" in content:
        raise UserError(f"--list {shortened(file)} is no text file")
    root = os.fsencode(os.path.join(os.path.abspath(folder), ""))
    lines = content.removeprefix(codecs.BOM_UTF8).splitlines()
    lines = filter(None, map(bytes.rstrip, lines))  # no image's name ends with a space
    paths = [os.path.normpath(os.path.join(root, line)).removeprefix(root) for line in lines]
    if not paths:
        raise UserError(f"--list {shortened(file)} names no image")
    images = np.array(sorted(paths), dtype=np.bytes_)
    repeated = images[1:][images[1:] == images[:-1]]
    if len(repeated):
        raise UserError(
            f"--list {shortened(file)} names {len(repeated)} images again, such as "
            f"{_named(repeated[0])}: an image is one instance, list it once"
        )
    missing = list(_missing(root, paths))
    if missing:
        some = ", ".join(map(_named, missing[:3]))
        raise UserError(
            f"{len(missing)} of the {len(paths)} images of --list {shortened(file)} are not in "
            f"{shortened(folder)}: {some}{', ...' if len(missing) > 3 else ''}"
        )
    return images


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not blank, without space around them; bytes that are no UTF-8 as
    in the names of files. Raises UserError for what is no text."""
    content = read_regular(path)
    if b"\0" in content:
        raise UserError(f"cannot read {path}: it is no text")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    return [line.strip() for line in text.split("\n") if line.strip()]


def write_list(file: Path, paths: Iterable[bytes]) -> None:
    """What `read_list` reads. Raises UserError for a name that is more than a line."""
    lines = [path + b"\n" for path in paths]
    for line in lines:
        if len(line.splitlines()) > 1 or b"\r" in line:
            raise UserError(f"a list cannot hold the name {shown(os.fsdecode(line[:-1]))}")
    with replacing(file) as temporary:
        temporary.write_bytes(b"".join(lines))


def _missing(root: bytes, paths: list[bytes]) -> Iterator[bytes]:
    """Those that no folder has. A folder is read as a whole: a look at each file of it takes long
    where the disk is another computer's."""
    below = defaultdict(list)
    for path in paths:
        below[os.path.dirname(path)].append(path)
    for parent in sorted(below):
        try:
            names = set(os.listdir(os.path.join(root, parent)))
        except OSError:
            names = set()
        yield from (path for path in below[parent] if os.path.basename(path) not in names)


def _named(path: bytes) -> str:
    return one_line(os.fsdecode(path), 80)


# -- seen alike -----------------------------------------------------------------------------------


def fingerprint(paths: Iterable[bytes], labels: np.ndarray | None = None) -> dict:
    """How many images a list has, and a hash of their names and labels, for a checkpoint."""
    names = list(paths)
    digest = hashlib.sha256(b"\0".join(names))
    if labels is not None:
        digest.update(labels.astype(np.int64).tobytes())
    return {"images": len(names), "hash": digest.hexdigest()[:16]}


def seen_alike(find: Callable[[], Found], identify: Callable[[Found], object]) -> Found:
    """What `find` gives, if every process finds the same. Collective.

    Args:
        identify: what of it is compared.

    Raises:
        UserError: they do not, or one of them cannot find it; on every process.
    """
    error = None
    try:
        found = find()
        mine = identify(found)
    except UserError as failure:
        error, mine = failure, str(failure)
    everyones = all_objects((mine, error is not None))
    if error:
        raise error
    for process, (theirs, failed) in enumerate(everyones):
        if failed:
            raise UserError(f"process {process}: {theirs}")
        if theirs != everyones[0][0]:
            raise UserError(
                f"process {process} sees other data than process 0: {_said(theirs)}, there "
                f"{_said(everyones[0][0])}; give every process the same DATA"
            )
    return found


def check_unchanged(before: dict | None, now: dict, path: Path) -> None:
    """UserError where the checkpoint `path` is of other data, by its `fingerprint`, if it has one.

    Its position is then that of none of these images.
    """
    if before and before != now:
        raise UserError(
            f"{path} is of other data: {_said(before)}, here {_said(now)}; resume it with the same "
            "images, or begin its epoch anew with these by --restart-epoch"
        )


def _said(seen) -> str:
    if isinstance(seen, dict):
        return " ".join(f"{name} {value}" for name, value in seen.items())
    return " and ".join(map(_said, seen))
