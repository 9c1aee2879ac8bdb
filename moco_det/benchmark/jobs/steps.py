"""Commands run one after another: their output with a prefix, one ETA for all of them.

A step is a process of its own, so that a chain behaves as its commands typed by hand would, and
the engines stay unknown to it. Steps of one kind are expected to take equally long.
"""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STOP_SECONDS = 20  # what an interrupted step gets to end by itself


@dataclass(frozen=True)
class Step:
    """One command. `expected`: seconds it takes, a guess until a step of its `kind` has ended."""

    name: str
    kind: str
    command: Sequence[str]
    expected: float

    def as_typed(self) -> str:
        return shlex.join(self.command)


class StepFailed(Exception):
    """A step ended with an exit code other than 0; `code` is what a shell would report."""

    def __init__(self, step: Step, code: int, log: Path):
        super().__init__(
            f"step '{step.name}' failed with exit code {code}; its output is above and in {log}. "
            f"Its command: {step.as_typed()}"
        )
        self.code = code


@dataclass
class Eta:
    """The time that a chain of steps still needs; `now` is any clock in seconds."""

    steps: Sequence[Step]
    measured: dict[str, float] = field(default_factory=dict)  # kind -> seconds
    index: int = 0
    begun: float = 0.0
    end: float = 0.0  # when the running step should end

    def begin(self, index: int, now: float) -> None:
        self.index, self.begun = index, now
        self.end = now + self._expected(self.steps[index])

    def hear(self, line: str, now: float) -> None:
        """Let the running step's own ETA, if `line` holds one, replace the expectation."""
        announced = announced_eta(line)
        if announced is not None:
            self.end = now + announced

    def finish(self, now: float) -> float:
        """Note how long the running step took; returns it."""
        self.measured[self.steps[self.index].kind] = now - self.begun
        return now - self.begun

    def left(self, now: float) -> float:
        later = sum(self._expected(step) for step in self.steps[self.index + 1 :])
        return max(0.0, self.end - now) + later

    def _expected(self, step: Step) -> float:
        return self.measured.get(step.kind, step.expected)


def announced_eta(line: str) -> float | None:
    """Seconds in a line such as "... ETA 0:03:12" or "eta: 1 day, 2:03:04  iter: 7"."""
    found = re.search(r"\beta:? +(?:(\d+) days?, )?(\d+):(\d\d):(\d\d)\b", line, re.IGNORECASE)
    if not found:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def clock(seconds: float) -> str:
    """4:05, or 1:04:05 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def run_steps(steps: Sequence[Step], log_path: Path) -> list[float]:
    """Run all steps in order, print and log what they say; returns the seconds of each.

    Every line appears as "[2/7 pretrain | 6:10 left] line", the time being that of all steps.

    Raises:
        StepFailed: a step ended with an exit code other than 0; the later ones are not begun.
        KeyboardInterrupt, SystemExit: after the running step was stopped.
    """
    eta, durations = Eta(steps), []
    with open(log_path, "w", encoding="utf-8", buffering=1) as log:
        for index, step in enumerate(steps):
            eta.begin(index, time.monotonic())
            with contextlib.closing(_lines_of(step, log_path)) as lines:
                for line in itertools.chain([f"$ {step.as_typed()}"], lines):
                    eta.hear(line, time.monotonic())
                    left = clock(eta.left(time.monotonic()))
                    text = f"[{index + 1}/{len(steps)} {step.name} | {left} left] {line}"
                    print(text, flush=True)
                    log.write(text + "\n")
            durations.append(eta.finish(time.monotonic()))
    return durations


def _lines_of(step: Step, log_path: Path) -> Iterator[str]:
    """Start the step and yield its lines; stops it when the consumer stops. Raises StepFailed."""
    process = subprocess.Popen(
        step.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C reaches this process only, which then stops the step
    )
    try:
        with process.stdout:
            for line in process.stdout:
                if line.strip():
                    yield line.rstrip()
        code = process.wait()
    finally:
        _stop(process)
    if code:
        raise StepFailed(step, code if code > 0 else 128 - code, log_path)


def _stop(process: subprocess.Popen) -> None:
    """End a process that may still run: it is asked first, and killed if it does not listen."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
