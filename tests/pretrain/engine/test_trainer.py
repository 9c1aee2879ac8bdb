"""The loop on a task that one can follow by hand: positions, hooks, stops, resumes, reports."""

import math
import signal

import pytest
import torch
from pretraining_runs import records, values
from same_bits import assert_same_bits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.files import make_folder
from moco_det.common.processes import StopRequest
from pretrain.engine import trainer as trainer_module
from pretrain.engine.checkpoints import LAST, Checkpoint, find, load, load_model
from pretrain.engine.optimization import ScheduledSGD
from pretrain.engine.trainer import (
    MetricMeter,
    RunLog,
    RunSettings,
    Task,
    Trainer,
    progress_line,
)


class Numbers:
    """Batches [epoch, step] of three steps an epoch."""

    steps_per_epoch = 3

    def start(self, epoch: int, step: int) -> None:
        self.keys = [torch.tensor([epoch, step], dtype=torch.float) for step in range(step, 3)]

    def __iter__(self):
        return iter(self.keys)


class Line(Task):
    """A linear layer that follows the batches; notes what it is asked to do."""

    measures = ("loss", "acc1", "acc5")

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.batches = Numbers()
        self.optimizer = ScheduledSGD(self.model, 0.1, 0.9, 0.0, lambda epoch, step: 0.5**epoch)
        self.seen, self.stop_at, self.nan_at = [], None, None

    def step(self, batch, step):
        self.seen.append((*map(int, batch), step, self.optimizer.rate))
        loss = (self.model(batch) - 1).square().mean()
        self.optimizer.minimize(loss)
        if step == self.stop_at:
            self.stop.received = signal.SIGTERM
        value = math.nan if step == self.nan_at else float(loss.detach())
        return torch.tensor([value, 0.0, 0.0])

    def before_training(self, trainer):
        self.seen.append("begin")

    def after_epoch(self, trainer, number):
        self.seen.append(f"after {number}")

    def log_values(self, seen):
        return {"seen": seen}

    def state(self):
        return {"extra": len(self.seen)}


def run(output, task: Line, checkpoint=None, iterations=None, **settings) -> Trainer:
    config = {"batch_size": 8, "seed": 1}
    given = {"epochs": 2, "print_freq": 2} | settings
    task.stop = StopRequest()
    make_folder(output, "--output")
    trainer = Trainer(
        task, RunSettings(output, "toy", config, 8, **given), task.stop, checkpoint, iterations
    )
    trainer.train()
    return trainer


def test_every_step_has_its_position_and_its_rate(tmp_path):
    task = Line()
    trainer = run(tmp_path, task)
    assert task.seen == [
        "begin", (0, 0, 0, 0.1), (0, 1, 1, 0.1), (0, 2, 2, 0.1), "after 1",
        (1, 0, 3, 0.05), (1, 1, 4, 0.05), (1, 2, 5, 0.05), "after 2",
    ]  # fmt: skip
    assert (trainer.epoch, trainer.step_in_epoch, trainer.step) == (2, 0, 6)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 5, 6]
    assert records(tmp_path)[3]["epoch"] == pytest.approx(1 + 2 / 3)
    assert [record["seen"] for record in records(tmp_path)] == [8, 16, 24, 40, 48]  # of 8 a batch
    assert not (tmp_path / LAST).exists()  # saving is up to the task, or to --save-steps


def test_iterations_end_a_run_within_an_epoch(tmp_path):
    task = Line()
    trainer = run(tmp_path, task, iterations=4)
    assert task.seen[-2:] == [(1, 0, 3, 0.05), "after 2"]
    assert (trainer.epoch, trainer.step_in_epoch, trainer.epochs) == (1, 1, 2)
    assert records(tmp_path)[-1]["step"] == 4  # reported, although not yet due


def test_checkpoints_are_saved_every_so_many_steps_of_the_run(tmp_path, monkeypatch):
    """Epochs of three steps do not begin the count anew."""
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.step))
    run(tmp_path, Line(), epochs=4, save_steps=4)
    assert saved == [4, 8, 12]


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    run(tmp_path / "whole", Line(), save_steps=6)
    task = Line()
    task.stop_at = 3
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "stopped", task, save_steps=6)
    assert stopped.value.code == EXIT_INTERRUPTED
    checkpoint = find("auto", tmp_path / "stopped")
    assert [checkpoint.state[key] for key in ("epoch", "step_in_epoch", "step")] == [1, 1, 4]
    task = Line()
    load_model(task.model, checkpoint, "toy")
    run(tmp_path / "stopped", task, checkpoint, save_steps=6)
    assert task.seen == ["begin", (1, 1, 4, 0.05), (1, 2, 5, 0.05), "after 2"]
    whole, resumed = (load(tmp_path / name / LAST) for name in ("whole", "stopped"))
    assert resumed.pop("extra") < whole.pop("extra")
    assert_same_bits(resumed, whole)
    with pytest.raises(UserError, match="batches of 4; resume it with --batch-size 4"):
        checkpoint.state["config"]["batch_size"] = 4
        run(tmp_path / "other", Line(), checkpoint)


@pytest.mark.parametrize(
    ("position", "left"),
    [
        ({"epoch": 2, "step": 6}, ["begin"]),
        ({"epoch": 1, "step_in_epoch": 3, "step": 6}, ["begin", "after 2"]),  # to be closed only
        ({"epoch": 1}, ["begin", (1, 0, 3, 0.05), (1, 1, 4, 0.05), (1, 2, 5, 0.05), "after 2"]),
    ],
    ids=["done", "left after its last step", "official, without steps"],
)
def test_a_run_goes_on_where_a_checkpoint_says(tmp_path, position, left):
    before, task = Line(), Line()
    before.optimizer.minimize(before.model(torch.ones(1, 2)).mean())  # gives it its momentum
    state = {"state_dict": {}, "optimizer": before.optimizer.sgd.state_dict()} | position
    trainer = run(tmp_path, task, Checkpoint(tmp_path, state))
    assert task.seen == left
    assert (trainer.epoch, trainer.step_in_epoch) == (2, 0)


def test_a_nan_ends_the_run_before_it_is_saved(tmp_path):
    task = Line()
    task.nan_at = 3
    with pytest.raises(UserError, match="the loss is nan at step 4: lower --lr"):
        run(tmp_path, task, print_freq=100, save_steps=2)
    assert load(tmp_path / LAST)["step"] == 2


class Late:
    """A number that arrives later than the step that it is of."""

    def __init__(self, tensor):
        self.tensor = tensor.clone()
        tensor.fill_(-1.0)  # what is not waited for is wrong

    def wait(self):
        return self.tensor


@pytest.fixture
def reports_arrive_late(monkeypatch):
    """As on a GPU."""
    send = MetricMeter.send

    def sent_late(meter):
        meter.sent_at_once = False
        send(meter)

    monkeypatch.setattr(trainer_module, "HostCopy", Late)
    monkeypatch.setattr(MetricMeter, "send", sent_late)


@pytest.mark.usefixtures("reports_arrive_late")
def test_reports_that_arrive_late_are_the_same(tmp_path, monkeypatch):
    recorded, record = [], Trainer.record
    monkeypatch.setattr(
        Trainer,
        "record",
        lambda self, values, line="", step=None: (
            recorded.append((step, self.step)) or record(self, values, line, step)
        ),
    )
    run(tmp_path / "late", Line())
    assert recorded == [(1, 1), (2, 3), (3, 3), (5, 6), (6, 6)]  # one step later, if there is one
    monkeypatch.undo()
    run(tmp_path / "at once", Line())
    timed = {"images_per_second", "data_wait", "seconds_per_step"}
    late, at_once = (
        [{k: v for k, v in r.items() if k not in timed} for r in records(tmp_path / name)]
        for name in ("late", "at once")
    )
    assert late == at_once


@pytest.mark.usefixtures("reports_arrive_late")
def test_a_nan_that_arrives_late_is_not_saved_either(tmp_path):
    task = Line()
    task.nan_at = 1
    with pytest.raises(UserError, match="the loss is nan at step 2: lower --lr"):
        run(tmp_path, task, save_steps=2)
    assert not (tmp_path / LAST).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --output .*file"):
        make_folder(tmp_path / "file" / "below", "--output")


# -- what a person watches ------------------------------------------------------------------------

REPORT = {
    "loss": 5.25, "acc1": 12.5, "acc5": 50.0, "lr": 0.03, "images_per_second": 1234.4,
    "data_wait": 0.016, "seconds_per_step": 0.5,
}  # fmt: skip


def test_means_are_over_the_steps_since_the_last_report(monkeypatch):
    clock = iter([0.0, 100.0, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = MetricMeter(torch.device("cpu"), ("loss", "acc1"))
    meter.add(torch.tensor([9.0, 9.0]), 9.0)
    meter.reset()
    meter.add(torch.tensor([1.0, 10.0]), 0.5)
    meter.add(torch.tensor([2.0, 30.0]), 0.5)
    meter.send()
    meter.add(torch.tensor([7.0, 70.0]), 5.0)  # is of the next report
    assert meter.means(batch_size=16) == {
        "loss": 1.5, "acc1": 20.0, "images_per_second": 8.0, "data_wait": 0.25,
        "seconds_per_step": 2.0,
    }  # fmt: skip


def test_a_validation_that_is_done_again_is_not_logged_again(tmp_path):
    """The run was killed between the record and the checkpoint after it."""
    log = RunLog(tmp_path, 0)
    log.write(3, {"loss": 2.0})
    log.write(3, {"epoch": 1, "val_acc1": 50.0})
    log.board.close()
    (events,) = tmp_path.glob("events*")
    events.rename(events.with_name(events.name.replace("tfevents.", "tfevents.0")))  # is older
    log = RunLog(tmp_path, 3)
    log.write(3, {"flags": {}})
    log.write(3, {"epoch": 1, "val_acc1": 50.0})
    log.write(6, {"epoch": 2, "val_acc1": 60.0})
    log.board.close()
    assert values(tmp_path, "val_acc1") == [50.0, 60.0]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("val_acc1")] == [(3, 50.0), (6, 60.0)]


def test_a_resumed_log_drops_what_is_done_again(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step), "note": "text"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # cut short by a kill
    resumed = RunLog(tmp_path, 2)
    assert [record["loss"] for record in resumed.kept] == [1.0, 2.0]
    resumed.write(3, {"loss": 30.0})
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 2.0, 30.0]
    RunLog(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # a new run


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "loss 5.2500  acc@1 12.50 acc@5 50.00  lr 0.03  1234 img/s  data 2%  ETA 0:01:00"),
        (
            {"chance_loss": 11.09, "queue_fill": 0.25},
            "loss 5.2500 (chance 11.09)  acc@1 12.50 acc@5 50.00  lr 0.03  queue 25%  1234 img/s",
        ),
        (
            {"chance_loss": 11.09, "loss_nn": 10.456, "queue_fill": 0.25},
            "loss 5.2500 (chance 11.09) nn 10.5  acc@1 12.50 acc@5 50.00  lr 0.03  queue 25%  ",
        ),
    ],
)
def test_a_progress_line_says_what_was_logged(more, words):
    line = progress_line("200/200 [5000/5004]", 120, REPORT | more)
    assert line.startswith("epoch 200/200 [5000/5004]  " + words)
    assert len(line) <= 140
