"""Checkpoints and metrics as files, without a training loop around them."""

import json

import pytest
import torch

from moco_det.common.errors import UserError
from moco_det.native.engine.output_dir import Checkpoints, MetricLog

CONTENT = {"model": {"w": torch.arange(3.0)}, "optimizer": {}, "scheduler": {}, "iteration": 7}


def test_the_last_checkpoint_is_what_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.last() is None
    first = checkpoints.save("model_0000007", CONTENT)
    assert Checkpoints(tmp_path).last() == first == tmp_path / "model_0000007.pth"
    loaded = Checkpoints.load(first)
    assert torch.equal(loaded["model"]["w"], CONTENT["model"]["w"])
    assert loaded["iteration"] == 7
    checkpoints.save("model_final", CONTENT | {"iteration": 9})
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_name_outside_of_the_folder_does_not_keep_a_run_from_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "last_checkpoint").write_text("../model_final.pth")
    assert checkpoints.last() is None
    assert checkpoints.save("model_0000007", CONTENT) == checkpoints.last()


def test_weights_alone_cannot_be_resumed_from(tmp_path):
    path = Checkpoints(tmp_path).save("weights", {"model": CONTENT["model"]})
    with pytest.raises(UserError, match=r"resume from .*weights\.pth: it lacks iteration, opt"):
        Checkpoints.load(path)


def test_medians_of_twenty_iterations_and_no_time_of_the_first_three(tmp_path, capsys):
    with MetricLog(tmp_path, start_iter=0, max_iter=21) as log:
        for iteration in range(21):
            metrics = {"total_loss": float(iteration), "data_time": 0.5}
            log.step(iteration, 0.1, 100.0 if iteration < 3 else 2.0, metrics)
        log.results(21, {"bbox": {"AP": 1.0, "AP-cow": float("nan")}, "speed": 3})
    first, last, results = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert (first["iteration"], first["total_loss"], first["time"]) == (19, 9.5, 2.0)
    assert (last["iteration"], last["total_loss"], last["eta_seconds"]) == (20, 10.5, 0.0)
    assert results == {"iteration": 21, "bbox/AP": 1.0, "bbox/AP-cow": None, "speed": 3.0}
    assert [line.split("iter: ")[1][:2] for line in capsys.readouterr().out.splitlines()] == [
        "19",
        "20",
    ]


def test_the_end_is_that_of_all_stages(tmp_path, monkeypatch):
    """60 iterations of 2 s; evaluations of 100 s every 25 and at the end, one checkpoint of 7 s."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with MetricLog(tmp_path, start_iter=0, max_iter=60) as log:
        for iteration in range(60):
            log.step(iteration, 0.1, 2.0, {"total_loss": 1.0})
            if (iteration + 1) % 25 == 0:
                with log.timed("evaluation", 25):
                    now[0] += 100.0
            if iteration == 29:
                with log.timed("checkpoint", 0):
                    now[0] += 7.0
    lines = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    found = [line["eta_seconds"] for line in lines]
    assert found == [40 * 2, 20 * 2 + 2 * 100 + 7, 100 + 7]


@pytest.mark.parametrize("half", ['{"iteration": 0, "lr"', '{"a": {"iteration": 0}', "\0" * 100])
def test_half_a_line_that_a_kill_has_left_is_dropped_before_the_next(tmp_path, half):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0}\n' + half)
    with MetricLog(tmp_path, start_iter=0, max_iter=21) as log:
        log.write(1, {"lr": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"iteration": 0}, {"iteration": 1, "lr": 0.5}]
