"""A classifier's run as a job: pretrain/linear.py on a checkpoint as the user gives it.

OUTPUT/runs/EXPERIMENT/ROW/trialN/   --output of pretrain/linear.py: metrics.jsonl, checkpoints

Nothing is converted: the linear protocol and fine-tuning read a checkpoint of pretraining itself.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.encoder_runs import encoder_command, identity
from moco_det.benchmark.jobs.grid import ClassifierRun
from moco_det.benchmark.jobs.job import FINISHED, Command, Job, JobFolder
from moco_det.common.documents import read_json_lines, shown
from moco_det.common.errors import UserError
from pretrain.engine.checkpoints import LAST
from pretrain.evaluation.classification import BEST
from pretrain.flags.common import as_flags
from pretrain.flags.evaluation import linear_parser

TOP1, TOP5 = "classification/top1", "classification/top5"  # as metrics.json calls a detector's
# What the runner passes itself, or what would make another experiment of the run.
RUNNERS = {"output", "resume", "overwrite", "pretrained", "seed", "finetune", "evaluate"}


class ClassifierFolder(JobFolder):
    """Where one run keeps its files."""

    def __init__(self, run: ClassifierRun, output: Path):
        super().__init__(run.name, output / "runs" / run.name)
        self.run = run

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: reports of training and validations. Raises UserError."""
        path = self.path / "metrics.jsonl"
        if not os.path.lexists(path):
            return []
        records = read_json_lines(path, "the log", finite=False)
        for number, record in enumerate(records, 1):
            for name in {"step", "epoch", "loss", "val_acc1", "val_acc5"} & record.keys():
                value = record[name]
                if isinstance(value, bool) or not isinstance(value, int | float):
                    where = f"{path}, line {number}: {name}"
                    raise UserError(f"{where} is {shown(value)}: remove that folder")
        return records

    def validation(self) -> dict[str, Any]:
        """The last one; {} where there was none. The paper reports the last epoch, not the best."""
        found = [r for r in self.records() if {"epoch", "val_acc1", "val_acc5"} <= r.keys()]
        return found[-1] if found else {}

    def progress(self) -> str:
        return f"epoch {self.validation().get('epoch', 0)}"

    def results(self) -> dict[str, float]:
        """In percent; {} where nothing was validated."""
        last = self.validation()
        return {TOP1: last["val_acc1"], TOP5: last["val_acc5"]} if last else {}

    def losses(self) -> list[tuple[int, float]]:
        """(step from 1, training loss)."""
        return [(r["step"], r["loss"]) for r in self.records() if {"step", "loss"} <= r.keys()]

    def shortened(self) -> str | None:
        """How much shorter than the paper's a finished run's schedule was; None: not at all."""
        experiment, epochs = self.run.experiment, self.validation()["epoch"]
        if epochs >= experiment.epochs:
            return None
        share = 100 * epochs / experiment.epochs
        return (
            f"{experiment.name} ran {epochs} epochs, {share:.2g} % of the paper's "
            f"{experiment.epochs}"
        )

    def check_files(self, state: str) -> None:
        if state == FINISHED and not self.validation():
            path = self.path / "metrics.jsonl"
            raise UserError(f"{path} holds no validation: remove that folder")

    def repair(self) -> None:
        """Remove a best checkpoint that a kill has left without the last one: it would pass for
        another run's."""
        if not (self.path / LAST).is_file():
            (self.path / BEST).unlink(missing_ok=True)


def classifier_job(folder: ClassifierFolder, gpus: int, launch: Sequence[str] = ()) -> Job:
    """`launch`: torchrun and its arguments; without it the command starts a process for each GPU.

    Raises:
        UserError: the command would refuse the run's flags.
    """
    run = folder.run
    command = encoder_command(run, gpus, launch, "--output", str(folder.path), "--resume", "auto")
    return Job(
        folder,
        [Command(run.experiment.name, command)],
        identity(run),
        # Its numbers stay in metrics.jsonl; a run that was not validated has failed.
        read_result=lambda: {} if folder.results() else None,
        about={"engine": "pretrain", "seed": run.trial, "gpus": gpus},
    )


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """`epochs=10 schedule=6,8 cache_features=true` -> flags of pretrain/linear.py.

    Raises:
        UserError: not of that form, no flag, or one that the runner sets.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.replace("-", "_")
        if not (name and equals and text):
            raise UserError(f"--linear {word}: write NAME=VALUE, such as epochs=10")
        if name in RUNNERS:
            raise UserError(f"--linear {word}: {name} is each run's own")
        found[name] = {"true": True, "false": False}.get(text, text)
        if "," in text:
            found[name] = text.split(",")
    as_flags(found, linear_parser(), "--linear")
    return found
