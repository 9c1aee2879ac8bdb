"""A job: commands, the folder that they fill, and what its numbers depend on.

Whatever the commands are, the runner leaves in the folder

    run.json    what was run and what came of it: command, identity, attempts, state, result, and
                the code, packages and hardware that it ran with
    log.txt     all that the commands printed
    run.lock    held by the processes of the job while they live

A job is carried out by one process at a time, whoever starts it: the lock, which its commands
inherit, tells a job that goes on after its starter was killed from one that was interrupted.
"""

import contextlib
import fcntl
import functools
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moco_det.common.documents import read_json, shown
from moco_det.common.errors import UserError
from moco_det.common.files import write_json
from moco_det.common.installation import PACKAGE

TO_DO, RUNNING, INTERRUPTED, FAILED, FINISHED = STATES = (
    "to do", "running", "interrupted", "failed", "finished",
)  # fmt: skip
UNREADABLE = "unreadable"  # of a folder whose files are damaged; see `JobFolder.look`

# The entries of run.json that are read again, and what they are.
ENTRIES = {
    "state": str, "command": str, "identity": dict, "attempts": list, "seconds": (int, float),
    "code": dict, "packages": dict, "hardware": dict, "measures": dict, "source": str,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """A job's state and record; or UNREADABLE, an empty record and the `problem`."""

    state: str
    record: Mapping[str, Any]
    problem: str = ""


LOG_LINES = 8  # of the end of a failed job's log


class JobFolder:
    """The folder of one job.

    Args:
        name: of the job, for messages.
        previous: () -> the record that an earlier version of this package has left in files of
            other names; read where there is no run.json.
    """

    def __init__(self, name: str, path: Path, previous: Callable[[], dict[str, Any]] = dict):
        self.name, self.path, self._previous = name, path, previous

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def record(self) -> dict[str, Any]:
        """run.json; {} of a job that was never begun. Raises UserError for what is no record."""
        path = self.path / "run.json"
        if not os.path.lexists(path):
            return self._earlier_record()
        try:
            record = read_json(path, "the record")
        except UserError as error:
            raise UserError(f"{error}: remove that folder") from error
        return _checked_record(record, path)

    def _earlier_record(self) -> dict[str, Any]:
        try:
            return _checked_record(self._previous(), self.path)
        except (KeyError, TypeError) as error:
            reason = f"the files of an earlier version in {self.path} lack {error}"
            raise UserError(f"{reason}: remove that folder") from error

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace run.json at once, so that a kill leaves the old one or the new one."""
        self.make()
        write_json(self.path / "run.json", record, indent=2)

    def make(self) -> None:
        """Raises UserError where the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error

    def state(self) -> str:
        """One of STATES, now."""
        state = self.record.get("state", TO_DO)
        if state == FINISHED:
            return FINISHED
        if self._locked():
            return RUNNING
        return INTERRUPTED if state == RUNNING else state

    def look(self) -> Look:
        """State and record, now, whatever the files hold: one damaged folder is no other's."""
        try:
            record, state = self.record, self.state()
            if state != TO_DO:
                self.check_files(state)
        except UserError as error:
            return Look(UNREADABLE, {}, str(error))
        return Look(state, record)

    def check_files(self, state: str) -> None:
        """UserError where the files of a job in `state` cannot be what its commands have left."""

    def progress(self) -> str:
        """How far the job is, in words; "" where its files do not tell."""
        return ""

    def repair(self) -> None:
        """Mend, before the commands start again, what a kill may have left in their files."""

    def log_end(self) -> list[str]:
        """The last lines of the log, for a message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.strip()][-LOG_LINES:]

    def _locked(self) -> bool:
        try:
            with open(self.path / "run.lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @contextlib.contextmanager
    def claimed(self, stopped=lambda: False, notify=print) -> Iterator[int]:
        """Hold the job's lock, waiting for another process that works on it.

        Yields:
            The lock's file descriptor, for commands to inherit; -1 where `stopped()` became true
            before the lock was free.
        """
        self.make()
        with open(self.path / "run.lock", "a") as file:
            tries = 0
            while not stopped():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    tries += 1
                    if tries == 2:  # at the first it may have been a look at the state
                        notify(f"{self.name}: another process is at it; waiting for its end")
                    time.sleep(0.5)
                else:
                    yield file.fileno()
                    return
            yield -1


def _checked_record(record: Any, path: Path) -> dict[str, Any]:
    """UserError unless `record` is one, as far as it will be read."""
    if not isinstance(record, dict):
        raise UserError(f"{path} is no record of a run: remove that folder")
    wrong = [
        name
        for name, kind in ENTRIES.items()
        if name in record and not isinstance(record[name], kind)
    ]
    if record.get("state", TO_DO) not in STATES:
        wrong.append("state")
    if not all(isinstance(attempt, dict) for attempt in record.get("attempts", [])):
        wrong.append("attempts")
    if wrong:
        words = f"its {wrong[0]} is {shown(record[wrong[0]])}"
        raise UserError(f"{path} is no record of a run ({words}): remove that folder")
    return record


@dataclass(frozen=True, eq=False)
class Command:
    """One command, equal to itself alone.

    `seconds`: what it is expected to take, a guess until one of its name has ended.
    """

    name: str
    argv: Sequence[str]
    seconds: float | None = None

    def as_typed(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class Job:
    """Commands that are run one after another in a folder of their own.

    A job that was interrupted is begun again with its first command, so that each command has to go
    on from what it finds.

    Args:
        identity: what makes two jobs the same, as JSON has it: where it differs, the numbers of one
            are not the other's.
        read_result: () -> what run.json is to keep of the result; None where the commands have left
            none, which is a failure.
        about: what else run.json is to say.
    """

    folder: JobFolder
    commands: Sequence[Command]
    identity: Mapping[str, Any] = field(default_factory=dict)
    read_result: Callable[[], Mapping[str, Any] | None] = dict
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """All of it, as one would type it."""
        return " && ".join(command.as_typed() for command in self.commands)

    def check_identity(self) -> None:
        """UserError where the folder holds a job of other settings."""
        found = self.folder.record.get("identity")
        if found is None or found == self.identity:
            return
        keys = dict.fromkeys([*self.identity, *found])
        words = "; ".join(
            f"{key} was {found.get(key)}, is {self.identity.get(key)}"
            for key in keys
            if found.get(key) != self.identity.get(key)
        )
        raise UserError(
            f"{self.folder.path} holds a trial with other settings ({words}): name another "
            "--output, or remove that folder"
        )


def script_job(
    folder: JobFolder, arguments: Sequence[object], seconds: float, **fields: Any
) -> Job:
    """A job of one command: Python with `arguments`. `fields`: of `Job`."""
    argv = [sys.executable, *map(str, arguments)]
    return Job(folder, [Command(folder.name, argv, seconds)], **fields)


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those that are still to be run. Raises UserError where a folder holds another job."""
    for job in jobs:
        job.check_identity()
    return [job for job in jobs if job.folder.state() != FINISHED]


# -- what a number came from ----------------------------------------------------------------------

PACKAGES = (
    "torch", "torchvision", "numpy", "fvcore", "pycocotools", "opencv-python-headless",
    "detectron2", "faster-coco-eval", "cityscapesScripts",
)  # fmt: skip


def provenance() -> dict[str, dict[str, str]]:
    """{"code", "packages", "hardware"}: label -> text, for people and for run.json."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "code": {"moco_det": version("moco_det") or "not installed", "commit": commit()},
        "packages": {"python": platform.python_version()}
        | {name: found for name, found in versions.items() if found},
        "hardware": hardware(),
    }


def environment() -> dict[str, str]:
    """All of `provenance` as one list of label and text."""
    return {k: text for group in provenance().values() for k, text in group.items()}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str]:
    gpus = torch.cuda.device_count()
    return {
        "host": socket.gethostname(),
        "processor": f"{processor()}, {cores()} core{'s' * (cores() > 1)}",
        "gpu": f"{gpus} x {torch.cuda.get_device_name(0)}" if gpus else "none",
        "system": platform.platform(),
    }


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def commit() -> str:
    """The commit, with "-dirty" where files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


@functools.cache
def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
