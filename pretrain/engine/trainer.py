"""The training loop: batches in, checkpoints and metrics out. What is trained is a `Task`."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moco_det.common.errors import UserError
from moco_det.common.processes import (
    StopRequest,
    end_run,
    is_main,
    print_on_main,
    world_size,
)
from moco_det.common.resume_state import entries_of
from pretrain.engine import checkpoints
from pretrain.engine.checkpoints import Checkpoint
from pretrain.engine.diagnosis import Doctor
from pretrain.engine.optimization import ScheduledSGD
from pretrain.engine.watching import MetricMeter, Report, RunLog, Stages, progress_line


class Task:
    """What a run trains, on which batches, and what one step is. A `Trainer` does the rest.

    Attributes:
        model: what checkpoints keep as "state_dict".
        batches: a source of batches, see `pretrain.data`.
        optimizer: steps on (a part of) the model.
        measures: names of the values that a step returns; "loss", "acc1", "acc5" among them.
        group: of these values where they are shown.
    """

    model: nn.Module
    batches: object
    optimizer: ScheduledSGD
    measures: tuple[str, ...]
    group = "training"

    def step(self, batch, step: int) -> torch.Tensor:
        """Train on this process's `batch`, the run's step number `step`.

        Returns:
            the `measures`, on the device: reading them here would wait for it.
        """
        raise NotImplementedError

    def log_values(self, seen: int) -> dict[str, float]:
        """More for the log, after `seen` images."""
        return {}

    def pictures(self) -> dict[str, Callable[[], np.ndarray]]:
        """After a run's first step: names -> what draws uint8 RGB pixels H x W x 3 of its batch."""
        return {}

    def to_come(self, trainer: "Trainer") -> dict[str, int]:
        """How many of each kind of `Trainer.timed` are left to the task."""
        return {}

    def before_training(self, trainer: "Trainer") -> None:
        """Called before the first step of each start."""

    def after_epoch(self, trainer: "Trainer", number: int) -> None:
        """Called after epoch `number`, counted from 1; the last one may have been cut short."""

    def state(self) -> dict:
        """Entries of a checkpoint beside the loop's own and the model's. Collective."""
        return {}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Continue from the entries of `state`. Files of the official code may lack them."""


@dataclass(frozen=True)
class RunSettings:
    """Where a run writes, how long it is, and how often it reports and saves.

    Args:
        output: the folder of checkpoints and logs.
        arch, config: for its checkpoints; `config` are its flags.
        batch_size: global.
        epochs: where it ends, unless the trainer gets a number of iterations.
        start_epoch: where a new run begins; only the schedule depends on it.
        print_freq: steps between two reports.
        save_steps: steps between two checkpoints beside those of the task; 0 for none.
        trackers: what shows its numbers beside metrics.jsonl, names of `trackers.TRACKERS`.
    """

    output: Path
    arch: str
    config: dict
    batch_size: int
    epochs: int
    start_epoch: int = 0
    print_freq: int = 10
    save_steps: int = 0
    trackers: tuple[str, ...] = ("tensorboard",)


class Trainer:
    """Takes a task to the end of its run; one of the run's processes.

    The position: `epoch` epochs are completed (so this is the number of the running one, from 0),
    with `step_in_epoch` steps beyond them; `step` steps were taken in all.

    Args:
        stop: a request to stop, which the loop heeds between two steps.
        checkpoint: where to continue from; its weights are loaded into the model already.
        iterations: length of the run in steps, instead of epochs.
        doctor: hears what is logged; its findings are printed.

    Raises:
        UserError: the checkpoint does not fit.
    """

    def __init__(
        self,
        task: Task,
        settings: RunSettings,
        stop: StopRequest,
        checkpoint: Checkpoint | None = None,
        iterations: int | None = None,
        doctor: Doctor | None = None,
    ):
        self.task = task
        self.settings = settings
        self.output = settings.output
        self.stop = stop
        self.doctor = doctor
        self.steps_per_epoch = task.batches.steps_per_epoch
        self.epoch, self.step_in_epoch, self.step = settings.start_epoch, 0, 0
        if checkpoint:
            self._resume(checkpoint)
        self._find_end(settings.epochs, iterations)
        self.log = RunLog(self.output, self.step, settings.trackers, task.group)
        self.log.settings(settings.config)
        self.stages = Stages()
        self.meter = MetricMeter(next(task.model.parameters()).device, task.measures)
        self.begun_report: Report | None = None
        self.last_values: dict[str, float] = {}  # the latest of each name that was logged
        for record in self.log.kept:
            self._remember(record)
        if doctor:
            for record in self.log.kept:
                doctor.hear(record)
            counted = {"cores": len(os.sched_getaffinity(0)), "last_step": self.last_step}
            self.record({"flags": settings.config | counted})

    def train(self) -> None:
        ended = False
        try:
            self.task.before_training(self)
            for epoch in range(self.epoch, self.epochs):
                self.train_epoch(epoch)
                self.task.after_epoch(self, epoch + 1)
            ended = True
        finally:
            self.log.close(failed=not ended)

    def train_epoch(self, epoch: int) -> None:
        """The rest of epoch `epoch` from where the run stands."""
        self.epoch = epoch
        self.meter.reset()
        self.task.batches.start(epoch, self.step_in_epoch)
        batches = iter(self.task.batches)
        while self.step_in_epoch < self.steps_per_epoch and self.step < self.last_step:
            begun = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begun
            self.task.optimizer.set_rate(epoch, self.step)
            self.meter.add(self.task.step(batch, self.step), waited)
            self.step_in_epoch += 1
            self.step += 1
            self.after_step()
        if self.step_in_epoch == self.steps_per_epoch:
            self.epoch, self.step_in_epoch = epoch + 1, 0

    def after_step(self) -> None:
        """What is due between two steps: a report, a checkpoint, heeding a request to stop."""
        ends = self.step == self.last_step or self.step_in_epoch == self.steps_per_epoch
        reporting = ends or self.step_in_epoch % self.settings.print_freq == 0
        save_steps = self.settings.save_steps
        saving = save_steps and self.step % save_steps == 0
        if self.begun_report:
            self.end_report()  # of the step before: the device has ended that one meanwhile
        if reporting or saving or self.step == 1:
            self.begin_report()
        # At once where there is nothing to wait for, or before what follows: a NaN must not reach a
        # checkpoint, and the last lines of an epoch stand in their order.
        if self.begun_report and (self.meter.sent_at_once or ends or saving or self.step == 1):
            self.end_report()
        if self.step == 1:
            for name, draw in self.task.pictures().items():
                self.log.picture(self.step, name, draw)
        if saving:
            self.save()
        # Several processes must agree on the step to stop at, which costs a message: seldom.
        if (reporting or world_size() == 1) and self.stop.agreed():
            if self.meter.steps:
                self.begin_report()
            if self.begun_report:
                self.end_report()
            self.save()
            end_run(self.stop.received, f"{self.output / checkpoints.LAST} at step {self.step}")

    def begin_report(self) -> None:
        """Have the means since the last report sent from the device. Collective."""
        self.meter.send()
        others = {"lr": self.task.optimizer.rate}
        others |= self.task.log_values(self.step * self.settings.batch_size)
        place = f"{self.epoch + 1}/{self.epochs} [{self.step_in_epoch}/{self.steps_per_epoch}]"
        self.begun_report = Report(self.step, self.epochs_done, place, others)

    def end_report(self) -> None:
        """Log them. Raises UserError when the loss is NaN."""
        step, epoch, place, others = self.begun_report
        values = {"epoch": epoch} | self.meter.means(self.settings.batch_size) | others
        self.begun_report = None
        line = progress_line(place, self.last_step - step, values, self.seconds_beside_steps())
        self.record(values, line, step)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """What is done while this is open is no step, and of that kind."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self.stages.taken[stage].append(seconds)
        self.meter.leave_out(seconds)

    def seconds_beside_steps(self) -> float:
        """That are still to come, as far as such stages have been measured."""
        to_come = dict(self.task.to_come(self))
        if every := self.settings.save_steps:
            checkpoints_left = self.last_step // every - (self.step - 1) // every  # with one now
            to_come["checkpoint"] = to_come.get("checkpoint", 0) + checkpoints_left
        return self.stages.seconds(to_come)

    def record(self, values: dict, line: str = "", step: int | None = None) -> None:
        """Write `values` to the log; print `line`, and what the doctor newly says of them.

        Args:
            step: that they are of; by default the last one.

        Raises:
            UserError: "loss" is among them and is NaN or infinite.
        """
        step = self.step if step is None else step
        self.log.write(step, values)
        self._remember(values)
        findings = self.doctor.hear({"step": step, **values}) if self.doctor else []
        loss = values.get("loss", 0.0)
        if not math.isfinite(loss):
            unheard = f"the loss is {loss} at step {step}: lower --lr"
            raise UserError(findings[0].text if findings else unheard)
        for text in ([line] if line else []) + findings:
            print_on_main(str(text))

    def _remember(self, values: dict) -> None:
        self.last_values |= {n: v for n, v in values.items() if n not in ("flags", "step")}

    def save(self, name: str = checkpoints.LAST) -> None:
        """Write the run's state to `name` in its folder. Collective."""
        with self.timed("checkpoint"):
            self._save(name)

    def _save(self, name: str) -> None:
        state = {
            "epoch": self.epoch,
            "arch": self.settings.arch,
            "state_dict": checkpoints.model_state(self.task.model),
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "config": self.settings.config,
        }
        state |= self.task.optimizer.state() | self.task.state()
        if is_main():
            checkpoints.save(state, self.output / name)

    @property
    def epochs_done(self) -> float:
        """With the fraction of the running one."""
        return self.epoch + self.step_in_epoch / self.steps_per_epoch

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Continue where it stopped; one of the official code continues at its epoch."""
        path, state = checkpoint
        self.task.load_state(checkpoint)
        with entries_of(path):
            self.task.optimizer.load_state(state)
        self.epoch = max(self.epoch, state["epoch"])
        self.step_in_epoch = state.get("step_in_epoch", 0)
        self.step = state.get("step", self.epoch * self.steps_per_epoch)
        now = self.settings.batch_size
        before = state.get("config", {}).get("batch_size", now)
        if self.step_in_epoch and before != now:
            raise UserError(
                f"{path} stopped within an epoch of batches of {before}; resume it with "
                f"--batch-size {before}, the position is counted in these"
            )
        if self.step_in_epoch > self.steps_per_epoch:
            raise UserError(
                f"{path} stopped after step {self.step_in_epoch} of an epoch, which has "
                f"{self.steps_per_epoch} steps of this data: resume it with its own, or begin its "
                "epoch anew by --restart-epoch"
            )
        print_on_main(f"resumed {path} at epoch {self.epoch}, step {self.step}")

    def _find_end(self, epochs: int, iterations: int | None) -> None:
        """Set `last_step`, and `epochs`: the number of the epoch with it, counted from 1.

        An epoch that was left after its last step, before it was closed, is still to come.
        """
        left = (epochs - self.epoch) * self.steps_per_epoch - self.step_in_epoch
        left = max(0, iterations - self.step if iterations else left)
        self.last_step = self.step + left
        self.epochs = self.epoch
        if left or self.step_in_epoch == self.steps_per_epoch:
            self.epochs += math.ceil((self.step_in_epoch + left) / self.steps_per_epoch)


def epochs_left(done: int, last: int, every: int) -> int:
    """How many of the epochs after `done` are of a number `every`, or the last one."""
    return last // every - done // every + (last % every > 0 and last > done)
