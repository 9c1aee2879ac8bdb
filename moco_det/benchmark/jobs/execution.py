"""Carry out one run: its command as a process, again where it failed, on where it was stopped."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.grid import Run
from moco_det.benchmark.jobs.provenance import provenance
from moco_det.benchmark.jobs.runs import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunFolder,
    check_identity,
    identity,
)

STOPPED_BY_SIGTERM = 75  # exit code of tools/train_net.py: a checkpoint is saved
STOP_SECONDS = 90  # what a stopped run gets to save its checkpoint


@dataclass(frozen=True)
class Settings:
    """What all runs of a reproduction have in common.

    `engine`: "native" or "detectron2"; `gpus`: processes of a run on each machine; `retries`: how
    often a failed run is begun again.
    """

    repository: Path
    output: Path
    engine: str
    gpus: int = 1
    retries: int = 1

    def folder(self, run: Run) -> RunFolder:
        return RunFolder(run, self.output)

    def command(self, run: Run, launch: Sequence[str] = ()) -> list[str]:
        """tools/train_net.py with its arguments.

        `launch`: torchrun and its arguments; without it the script starts its processes itself.
        """
        script = str(self.repository / "tools/train_net.py")
        return [
            *(launch or [sys.executable]), script, "--resume", "--engine", self.engine,
            *([] if launch else ["--num-gpus", str(self.gpus)]),
            "--config-file", str(run.config_file), *run.options,
            "SEED", str(run.trial), "OUTPUT_DIR", str(self.folder(run).path),
        ]  # fmt: skip


@dataclass
class Execution:
    """One run in this process's hands; `stop` may be called from another thread.

    `environment`: variables for the command, beside this process's own; `command`: in place of the
    settings' own; `say`: takes a line for the user.
    """

    run: Run
    settings: Settings
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] | None = None
    say: Any = print

    def __post_init__(self):
        self.folder = self.settings.folder(self.run)
        # No threading.Event: a signal handler that sets one may wait for a lock for ever.
        self._stop_asked = False
        self._process: subprocess.Popen | None = None

    @property
    def begun(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """Ask the run to save a checkpoint and end; `carry_out` sees to it."""
        self._stop_asked = True

    def carry_out(self) -> str:
        """Run until finished, failed or stopped; returns the state. A finished run is left alone.

        Raises:
            UserError: the folder holds a run of other settings.
        """
        check_identity(self.folder, identity(self.run, self.settings.engine))
        with self.folder.claimed(lambda: self._stop_asked, self.say) as lock:
            state = self.folder.record.get("state")
            if state == FINISHED or lock < 0:
                return self.folder.state() if lock < 0 else FINISHED
            for attempt in range(1 + self.settings.retries):
                state = self._attempt(lock)
                if state != FAILED or self._stop_asked:
                    break
                if attempt < self.settings.retries:
                    self.say(f"{self.run.name}: failed, trying again; see {self.folder.log}")
        return state

    def _attempt(self, lock: int) -> str:
        """Start the command and wait for its end; writes what came of it; returns the state."""
        command = list(self.command or self.settings.command(self.run))
        started, clock = datetime.now(timezone.utc), time.monotonic()
        record = self._begin(command)
        self.folder.repair()
        with open(self.folder.log, "ab", buffering=0) as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(self.environment),
                pass_fds=(
                    lock,
                ),  # held as long as the command lives, should this process be killed
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops it
            )
            code = self._wait()
        state = self._state(code)
        seconds = round(time.monotonic() - clock, 1)
        record["attempts"].append(
            {"started": started.isoformat(timespec="seconds"), "seconds": seconds, "code": code}
        )
        record["seconds"] = round(sum(entry["seconds"] for entry in record["attempts"]), 1)
        self.folder.write_record(record | {"state": state})
        return state

    def _begin(self, command: Sequence[str]) -> dict[str, Any]:
        run, settings = self.run, self.settings
        record = {
            "name": run.name,
            "state": RUNNING,
            "identity": identity(run, settings.engine),
            "command": shlex.join(command),
            "config_file": str(run.config_file),
            "engine": settings.engine,
            "seed": run.trial,
            "gpus": settings.gpus,
            **provenance(settings.repository),
            "attempts": self.folder.record.get("attempts", []),
            "seconds": self.folder.record.get("seconds", 0.0),
        }
        self.folder.write_record(record)
        return record

    def _wait(self) -> int:
        """The exit code. Asks a stopped run to end, and kills it where it does not."""
        while self._process.poll() is None and not self._stop_asked:
            time.sleep(0.2)
        self.end_process()
        return self._process.wait()

    def end_process(self) -> None:
        """Have the command, if it runs, save its checkpoint and end; kill it where it does not."""
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _state(self, code: int) -> str:
        if code == 0 and self.folder.results():
            return FINISHED
        if self._stop_asked or code == STOPPED_BY_SIGTERM:
            return INTERRUPTED
        return FAILED


def reasons(folder: RunFolder) -> list[str]:
    """Why a failed run failed, as far as its files tell."""
    attempts = folder.record.get("attempts", [])
    code = attempts[-1]["code"] if attempts else None
    head = "evaluated nothing" if code == 0 else f"exit code {code}"
    return [f"{folder.run.name}: {head}; the end of {folder.log}:", *folder.log_end()]
