"""The loop on a task that one can follow by hand: positions, hooks, stops, resumes, reports."""

import contextlib
import math
import signal

import pytest
import torch
from pretraining_runs import records
from same_bits import assert_same_bits
from torch import nn

from moco_det.common.errors import EXIT_INTERRUPTED, UserError
from moco_det.common.files import make_folder
from moco_det.common.processes import StopRequest
from pretrain.engine import trainer as trainer_module
from pretrain.engine import watching
from pretrain.engine.checkpoints import LAST, Checkpoint, find, load, load_model
from pretrain.engine.optimization import ScheduledSGD
from pretrain.engine.trainer import RunSettings, Task, Trainer, epochs_left
from pretrain.engine.watching import MetricMeter, RunLog


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

    monkeypatch.setattr(watching, "HostCopy", Late)
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


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_epochs_that_are_left_are_counted(every):
    for last in range(8):
        for done in range(last + 1):
            due = [n for n in range(done + 1, last + 1) if n % every == 0 or n == last]
            assert epochs_left(done, last, every) == len(due), (done, last)


def test_the_end_of_a_run_is_that_of_all_its_stages(tmp_path, monkeypatch):
    """A clock that steps leave alone: what is left are the stages, each as long as before."""
    now, printed = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(trainer_module, "print_on_main", printed.append)

    class Long(Line):
        def step(self, batch, step):
            now[0] += 0.5
            return super().step(batch, step)

        def after_epoch(self, trainer, number):
            with trainer.timed("validation"):
                now[0] += 100.0

        def to_come(self, trainer):
            return {"validation": trainer.epochs - trainer.epoch}

    def save(trainer, name):
        now[0] += 1000.0

    monkeypatch.setattr(Trainer, "_save", save)
    run(tmp_path, Long(), epochs=3, print_freq=3, save_steps=3)
    lines = [line.split()[1:3] + line.split()[-2:] for line in printed]
    assert lines == [
        ["1/3", "[1/3]", "ETA", "0:00:04"],
        ["1/3", "[3/3]", "ETA", "0:00:03"],  # nothing was measured yet
        ["2/3", "[3/3]", "ETA", "0:36:42"],  # 3 steps, 2 validations, 2 checkpoints
        ["3/3", "[3/3]", "ETA", "0:18:20"],  # a validation and a checkpoint
    ]
    assert [r["seconds_per_step"] for r in records(tmp_path)] == [0.5] * 4


def test_pictures_are_of_the_runs_first_step(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(RunLog, "picture", lambda log, step, name, draw: shown.append((step, name)))
    monkeypatch.setattr(Line, "pictures", lambda task: {"views": None})
    run(tmp_path / "whole", Line())
    state = {"state_dict": {}, "epoch": 1, "step": 3}
    before = Line()
    before.optimizer.minimize(before.model(torch.ones(1, 2)).mean())
    state["optimizer"] = before.optimizer.sgd.state_dict()
    run(tmp_path / "resumed", Line(), Checkpoint(tmp_path, state))
    assert shown == [(1, "views")]


@pytest.mark.parametrize("nan", [None, 3])
def test_the_log_is_closed_however_a_run_ends(tmp_path, monkeypatch, nan):
    closed = []
    monkeypatch.setattr(RunLog, "close", lambda log, failed: closed.append(failed))
    task = Line()
    task.nan_at = nan
    with pytest.raises(UserError) if nan else contextlib.nullcontext():
        run(tmp_path, task, print_freq=1)
    assert closed == [nan is not None]
