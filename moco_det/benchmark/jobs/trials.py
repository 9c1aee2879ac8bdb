"""Independent trials, several to a row of a table: each run once, continued, or reported as failed.

A trial is a chain of commands in a folder of its own, which holds
    trial.json    {settings, commands} from before they run: the folder belongs to these settings
    log.txt       what they printed
    result.json   {measures, seconds}: there once all of it is done, and never run again
Commands that were interrupted are run anew and have to continue by themselves.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_det.benchmark.jobs.steps import Step, StepFailed, clock, run_steps
from moco_det.common.errors import UserError
from moco_det.common.files import write_json


@dataclass(frozen=True)
class Trial:
    """One trial of `row`.

    Args:
        settings: what its numbers depend on, as JSON has it.
        read: () -> {measure: value}, from what the finished steps left.
    """

    row: str
    seed: int
    folder: Path
    settings: dict
    steps: Sequence[Step]
    read: Callable[[], dict[str, float]]

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def result(self) -> dict | None:
        """{measures, seconds} of a finished trial, else None."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def state(self) -> str:
        """What is the case: done, begun, or to do. Raises UserError for another trial's folder."""
        path = self.folder / "trial.json"
        if not path.exists():
            return "to do"
        if json.loads(path.read_text())["settings"] != self.settings:
            raise UserError(
                f"{self.folder} holds a trial with other settings, which {path} tells: name "
                "another --output, or delete the folder"
            )
        return "begun" if self.result() is None else "done"


def run_trials(trials: Sequence[Trial]) -> dict[str, str]:
    """Run what is not done; returns the reasons of those that failed, by the trials' names.

    Raises:
        UserError: a folder holds another trial, or cannot be written; nothing was run.
        KeyboardInterrupt, SystemExit: after the running command was stopped.
    """
    todo = [trial for trial in trials if trial.state() != "done"]
    failures, durations = {}, []
    print(f"{len(trials) - len(todo)} of {len(trials)} trials are done", flush=True)
    for index, trial in enumerate(todo):
        left = ""
        if durations:
            left = f", about {clock(sum(durations) / len(durations) * (len(todo) - index))} left"
        print(f"== trial {index + 1} of {len(todo)}: {trial.name}{left}", flush=True)
        try:
            durations.append(_run(trial))
        except StepFailed as failure:
            failures[trial.name] = f"{_last_line(trial.folder / 'log.txt')} ({failure})"
            print(f"== failed: {trial.name}: {failure}", flush=True)
    return failures


def _run(trial: Trial) -> float:
    """Run one trial to its result.json; returns its seconds."""
    begun = time.monotonic()
    try:
        trial.folder.mkdir(parents=True, exist_ok=True)
        about = {"settings": trial.settings, "commands": [s.as_typed() for s in trial.steps]}
        write_json(trial.folder / "trial.json", about)
    except OSError as error:
        raise UserError(f"cannot write to {trial.folder}: {error.strerror}") from error
    run_steps(trial.steps, trial.folder / "log.txt")
    seconds = time.monotonic() - begun
    measures = trial.read()
    write_json(trial.folder / "result.json", {"measures": measures, "seconds": round(seconds, 1)})
    return seconds


def _last_line(log: Path) -> str:
    """What a failed command said last, without the prefix of `run_steps`."""
    return log.read_text().splitlines()[-1].split("] ", 1)[-1]
