"""What a person watches: means, progress lines, the log, and where its numbers are shown."""

import pytest
import torch
from pretraining_runs import records, values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.engine.watching import MetricMeter, RunLog, Stages, progress_line

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


def test_what_is_no_step_is_left_out_of_their_time(monkeypatch):
    clock = iter([0.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = MetricMeter(torch.device("cpu"), ("loss",))
    for _ in range(2):
        meter.add(torch.tensor([1.0]), 0.5)
    meter.leave_out(10.0)  # a checkpoint
    meter.send()
    found = meter.means(batch_size=16)
    assert (found["seconds_per_step"], found["images_per_second"]) == (2.0, 8.0)
    assert found["data_wait"] == 0.25


def test_the_memory_of_a_gpu_is_logged(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    meter = MetricMeter(torch.device("cpu"), ("loss",))
    meter.add(torch.tensor([1.0]), 0.0)
    meter.send()
    assert "gpu_memory_gib" not in meter.means(1)
    meter.add(torch.tensor([1.0]), 0.0)
    meter.send()
    meter.device = torch.device("cuda")
    assert meter.means(1)["gpu_memory_gib"] == 1.5


def test_stages_to_come_take_as_long_as_those_before():
    stages = Stages()
    stages.taken["kNN"] += [10.0, 20.0]
    stages.taken["checkpoint"] += [1.0]
    to_come = {"kNN": 3, "checkpoint": 4, "validation": 5}  # of the last nothing is known
    assert stages.seconds(to_come) == 3 * 15 + 4 * 1
    line = progress_line("1/2 [3/4]", 120, REPORT, beside=stages.seconds(to_come))
    assert line.endswith("ETA 0:01:49")  # 60 s of steps


def test_a_validation_that_is_done_again_is_not_logged_again(tmp_path):
    """The run was killed between the record and the checkpoint after it."""
    log = RunLog(tmp_path, 0)
    log.write(3, {"loss": 2.0})
    log.write(3, {"epoch": 1, "val_acc1": 50.0})
    log.close()
    (events,) = tmp_path.glob("events*")
    events.rename(events.with_name(events.name.replace("tfevents.", "tfevents.0")))  # is older
    log = RunLog(tmp_path, 3)
    log.write(3, {"flags": {}})
    log.write(3, {"epoch": 1, "val_acc1": 50.0})
    log.write(6, {"epoch": 2, "val_acc1": 60.0})
    log.close()
    assert values(tmp_path, "val_acc1") == [50.0, 60.0]
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("validation/val_acc1")] == [
        (3, 50.0),
        (6, 60.0),
    ]


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
