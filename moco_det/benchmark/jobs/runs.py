"""The folder of a run: what was run, how far it is, and its numbers.

    run.json        command, config, seed, engine, code, packages, hardware, attempts, state
    log.txt         all that the command printed
    metrics.json, config.yaml, inference/, checkpoints: the trainer's own
    run.lock        held by the processes of the run while they live

A run is carried out by one process at a time, whoever starts it: the lock, which its command
inherits, tells a run that goes on after its starter was killed from one that was interrupted.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.grid import Run
from moco_det.common.errors import UserError
from moco_det.common.files import file_hash, write_json
from moco_det.config.loading import load_config

TO_DO, RUNNING, INTERRUPTED, FAILED, FINISHED = STATES = (
    "to do", "running", "interrupted", "failed", "finished",
)  # fmt: skip
LOG_LINES = 8  # of the end of a failed run's log


class RunFolder:
    """Where one run keeps its files."""

    def __init__(self, run: Run, output: Path):
        self.run = run
        self.path = output / "runs" / run.name

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def record(self) -> dict[str, Any]:
        """run.json; {} of a run that was never begun."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace run.json at once, so that a kill leaves the old one or the new one."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", record, indent=2)

    def state(self) -> str:
        """One of STATES, now."""
        state = self.record.get("state", TO_DO)
        if state == FINISHED:
            return FINISHED
        if self._locked():
            return RUNNING
        return INTERRUPTED if state == RUNNING else state

    def iteration(self) -> int:
        """How many iterations are done, as far as metrics.json tells."""
        lines = read_metrics(self.path)
        return max((line["iteration"] + 1 for line in lines if "lr" in line), default=0)

    def results(self) -> dict[str, float]:
        """See `read_results`."""
        return read_results(self.path)

    def losses(self) -> list[tuple[int, float]]:
        """(iteration from 1, total loss)."""
        lines = (line for line in read_metrics(self.path) if "total_loss" in line)
        return [(line["iteration"] + 1, line["total_loss"]) for line in lines]

    def log_end(self) -> list[str]:
        """The last lines of the log, for a message."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.strip()][-LOG_LINES:]

    def repair(self) -> None:
        """Drop a line of metrics.json that a kill has cut off: the next would be appended to it."""
        path = self.path / "metrics.json"
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)

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
    def claimed(self, stopped=lambda: False, say=print) -> Iterator[int]:
        """Hold the run's lock, waiting for another process that works on it.

        Yields:
            The lock's file descriptor, for the command to inherit; -1 where `stopped()` became true
            before the lock was free.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "run.lock", "a") as file:
            tries = 0
            while not stopped():
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    tries += 1
                    if tries == 2:  # at the first it may have been a look at the state
                        say(f"{self.run.name}: another process is at it; waiting for its end")
                    time.sleep(0.5)
                else:
                    yield file.fileno()
                    return
            yield -1


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of an OUTPUT_DIR's metrics.json, less those that a resumed run has repeated."""
    try:
        text = (folder / "metrics.json").read_text()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last is cut off where the run was killed
            content = json.loads(line)
            if "lr" in content:  # of training, not of an evaluation
                lines = [old for old in lines if old["iteration"] < content["iteration"]]
            lines.append(content)
    return lines


def read_results(folder: Path) -> dict[str, float]:
    """The last evaluation in an OUTPUT_DIR, "task/metric" -> percent; {} where there was none."""
    evaluations = [line for line in read_metrics(folder) if any("/" in key for key in line)]
    if not evaluations:
        return {}
    last = evaluations[-1].items()
    return {key: value for key, value in last if "/" in key and value is not None}


def identity(run: Run, engine: str) -> dict[str, Any]:
    """What makes two runs the same: where it differs, the numbers of one are not the other's."""
    settings = dict(zip(run.options[::2], run.options[1::2], strict=True))
    weights = settings.pop("MODEL.WEIGHTS", None)
    if weights and Path(weights).is_file():
        weights = file_hash(Path(weights))
    return {
        "config": run.config_file.name,
        "config_hash": _config_hash(run.config_file),
        "options": settings,
        "weights": weights,
        "seed": run.trial,
        "engine": engine,
    }


def check_identity(folder: RunFolder, wanted: Mapping[str, Any]) -> None:
    """UserError where the folder holds a run of other settings."""
    found = folder.record.get("identity")
    if found is None or found == wanted:
        return
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    words = "; ".join(f"{key} was {found.get(key)}, is {wanted[key]}" for key in differing)
    raise UserError(
        f"{folder.path} holds a run of other settings ({words}): name another --output, or remove "
        "that folder"
    )


@functools.cache
def _config_hash(path: Path) -> str:
    """Of all values that the file and those below it give; "" where there is no such file."""
    if not path.is_file():
        return ""
    return hashlib.sha256(load_config(str(path)).dump().encode()).hexdigest()[:16]
