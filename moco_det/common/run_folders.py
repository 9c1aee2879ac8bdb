"""The output folder of a run, which belongs to one run.

It is locked while the run lasts, and a new run does not take the folder of another unasked.
`claimed` is what every command that trains opens around its work.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.common.files import is_running, make_folder, remove_leftovers
from moco_det.common.processes import on_main

LOCK = ".lock"
LOCK_WITHOUT_LOCKS = ".lock.pid"  # on file systems that cannot lock


@dataclass(frozen=True)
class RunFiles:
    """What a kind of run leaves in its folder, as glob patterns, and the words for its flags.

    Args:
        marks: a folder with one of these holds a run that is worth keeping.
        others: what else belongs to the run.
        flag: the one that names the folder.
        resume: how the command goes on from a checkpoint.
    """

    marks: Sequence[str]
    others: Sequence[str]
    flag: str
    resume: str

    def of(self, folder: Path, patterns: Sequence[str]) -> list[Path]:
        return sorted(path for pattern in patterns for path in folder.glob(pattern))


@contextlib.contextmanager
def claimed(
    folder: str | Path, files: RunFiles, new: bool, overwrite: bool, reads: Sequence[str] = ()
) -> Iterator[None]:
    """Hold `folder` for the run of this process group, while open. Collective.

    The folder is made, and what killed processes have left half-written in it is removed.

    Args:
        new: the run does not go on from a checkpoint of this folder.
        overwrite: delete the run that the folder holds instead of refusing.
        reads: files that the run will read, which must not be among those.

    Raises:
        UserError: another process holds the folder; it holds another run; it cannot be written to.
    """
    with contextlib.ExitStack() as held:
        on_main(_claim, held, Path(folder), files, new, overwrite, reads)
        yield


def _claim(held: contextlib.ExitStack, folder, files: RunFiles, new, overwrite, reads) -> None:
    make_folder(folder, files.flag)
    held.enter_context(_locked(folder, files.flag))
    remove_leftovers(folder)
    earlier = files.of(folder, files.marks)
    if not new or not earlier:
        return
    if not overwrite:
        raise UserError(
            f"{files.flag} {folder} holds a run ({earlier[0].name}): go on with {files.resume}, "
            f"begin anew with --overwrite, which deletes it, or name another {files.flag}"
        )
    doomed = earlier + files.of(folder, files.others)
    for name in reads:
        if Path(name).resolve() in {path.resolve() for path in doomed}:
            raise UserError(f"--overwrite would delete {name}, which this run reads")
    for path in doomed:
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path, flag: str) -> Iterator[None]:
    """Hold the lock of a folder. Raises UserError where another process does; it names that."""
    # A record lock: it ends with this process, though its children have the file open as well, and
    # NFS knows it.
    with open(folder / LOCK, "a+") as file, contextlib.ExitStack() as held:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise _in_use(folder, flag, file.read()) from None
            held.enter_context(_locked_by_existence(folder, flag))
        file.truncate(0)
        file.write(_me())
        file.flush()
        yield


@contextlib.contextmanager
def _locked_by_existence(folder: Path, flag: str) -> Iterator[None]:
    path = folder / LOCK_WITHOUT_LOCKS
    if path.exists():
        owner = path.read_text()
        pid, _, host = owner.partition(" ")
        if host != socket.gethostname() or is_running(int(pid)):
            raise UserError(f"{_in_use(folder, flag, owner)}; if that is no more, remove {path}")
        path.unlink(missing_ok=True)
    try:
        with open(path, "x") as file:
            file.write(_me())
    except FileExistsError:
        raise _in_use(folder, flag, "") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _me() -> str:
    return f"{os.getpid()} {socket.gethostname()}"


def _in_use(folder: Path, flag: str, owner: str) -> UserError:
    pid, _, host = owner.partition(" ")
    who = f"process {pid} on {host}" if host else "another process"
    return UserError(
        f"{flag} {folder} is in use by {who}: wait for its end, or name another {flag}"
    )
