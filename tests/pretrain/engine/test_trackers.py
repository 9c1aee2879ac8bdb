"""The places where a run can be watched: the same in each, once, whatever fails or resumes."""

import json
import sys

import numpy as np
import pytest
from pretraining_runs import records
from services import mlflow, wandb  # noqa: F401 (fixtures)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_det.common import processes
from moco_det.common.errors import UserError
from pretrain.engine.trackers import RUNS, TRACKERS, check_packages, grouped
from pretrain.engine.watching import RunLog
from pretrain.flags.common import LOG
from pretrain.flags.pretraining import parse_pretraining

ALL = ("tensorboard", "wandb", "mlflow")
FLAGS = {"lr": 0.03, "mlp": True, "schedule": [1, 2], "resume": None, "data": "caf\udce9"}
SHOWN_FLAGS = FLAGS | {"data": r"caf\udce9"}  # a name that is not UTF-8
SHEET = np.zeros((4, 6, 3), np.uint8)


def test_the_flag_offers_what_there_is():
    assert set(LOG) == {*TRACKERS, "none"}
    assert parse_pretraining(["DATA"]).log == ["tensorboard"]
    assert parse_pretraining(["--log", "wandb", "mlflow", "--", "DATA"]).log == ["wandb", "mlflow"]
    with pytest.raises(UserError, match="--log wandb none: none goes with no other"):
        parse_pretraining(["--log", "wandb", "none", "--", "DATA"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "pretext/loss"),
        ("queue_fill", "pretext/queue_fill"),
        ("knn_top1", "features/knn_top1"),
        ("feature_std", "features/feature_std"),
        ("images_per_second", "speed/images_per_second"),
        ("gpu_memory_gib", "speed/gpu_memory_gib"),
        ("lr", "schedule/lr"),
        ("val_acc1", "validation/val_acc1"),
    ],
)
def test_values_are_in_groups(name, expected):
    assert grouped(name, "pretext") == expected


def write_run(output, step=0) -> RunLog:
    """Steps `step` + 1 to 3 of a run that shows a picture at 0 and 2."""
    log = RunLog(output, step, ALL)
    log.settings(FLAGS)
    for now in range(step, 4):
        if now in (0, 2) and (now > step or now == 0):
            log.write(now, {"epoch": now, "knn_top1": 10.0 * now})
            log.picture(now, "features/neighbours", lambda: SHEET)
        if now > step:
            log.write(now, {"loss": float(now), "note": "text"})
    log.close()
    return log


def test_all_show_the_same_numbers_and_pictures(tmp_path, wandb, mlflow):  # noqa: F811
    write_run(tmp_path)
    expected = [(0, "features/knn_top1", 0.0), (1, "pretext/loss", 1.0), (2, "pretext/loss", 2.0),
                (2, "features/knn_top1", 20.0), (3, "pretext/loss", 3.0)]  # fmt: skip
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = {(e.step, n, e.value) for n in board.Tags()["scalars"] for e in board.Scalars(n)}
    assert {entry for entry in shown if "epoch" not in entry[1]} == set(expected)
    pictures = board.Images("features/neighbours")
    assert [(e.step, e.height, e.width) for e in pictures] == [(0, 4, 6), (2, 4, 6)]
    told = board.PluginTagToContent("hparams")
    assert b"schedule" in told["_hparams_/session_start_info"]

    (logged,) = wandb.runs.values()
    assert logged[0] == SHOWN_FLAGS
    assert {(x["step"], n, v) for x in logged[1:] for n, v in x.items()} >= set(expected)
    assert [x["step"] for x in logged[1:] if "features/neighbours" in x] == [0, 2]
    assert wandb.ended == [0]

    (logged,) = mlflow.runs.values()
    assert logged[0] == ("params", {name: str(value) for name, value in SHOWN_FLAGS.items()})
    assert {(x[2], x[0], x[1]) for x in logged[1:] if len(x) == 3} >= set(expected)
    artifacts = [name for name, *rest in logged if rest == [(4, 6, 3)]]
    assert artifacts == ["features/neighbours/00000000.png", "features/neighbours/00000002.png"]
    assert mlflow.ended == ["FINISHED"]
    assert [record["step"] for record in records(tmp_path)] == [0, 1, 2, 2, 3]  # names stay flat
    assert "loss" in records(tmp_path)[1]


@pytest.mark.usefixtures("wandb", "mlflow")
def test_a_resumed_run_goes_on_where_it_was_without_showing_anything_twice(tmp_path, monkeypatch):
    write_run(tmp_path)
    (events,) = tmp_path.glob("events*")
    events.rename(events.with_name(events.name.replace("tfevents.", "tfevents.0")))  # is older
    write_run(tmp_path, step=1)  # does 2 and 3 again
    for service in ("wandb", "mlflow"):
        fresh = tmp_path / service
        fresh.mkdir()
        write_run(fresh)
        once, alone = (sys.modules[service].runs[f"run{i}"] for i in (0, 1))
        assert once == alone, service
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in board.Scalars("pretext/loss")] == [1, 2, 3]
    assert [e.step for e in board.Images("features/neighbours")] == [0, 2]
    write_run(tmp_path)  # a new run in the same folder is a new one there as well
    assert json.loads((tmp_path / RUNS).read_text())["wandb"] == "run3"
    (tmp_path / RUNS).write_text('["x"]')
    with pytest.raises(UserError, match="does not name the run of each tracker: remove it"):
        RunLog(tmp_path, 1, ALL)


def test_what_fails_in_the_course_of_a_run_is_left(tmp_path, wandb, mlflow, capsys):  # noqa: F811
    log = RunLog(tmp_path, 0, ALL)
    log.write(1, {"loss": 1.0})
    mlflow.broken = True
    for step in (2, 3):
        log.write(step, {"loss": 1.0})
    log.close(failed=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "warning: --log mlflow is switched off: the server is gone"
    assert [x["step"] for x in wandb.runs["run0"]] == [1, 2, 3]
    assert wandb.ended == [1]
    assert mlflow.ended == []


def test_what_cannot_begin_is_one_line(tmp_path, mlflow, monkeypatch):  # noqa: F811
    def refuse(**_):
        raise RuntimeError("no\nlogin")

    monkeypatch.setattr(mlflow, "start_run", refuse)
    with pytest.raises(UserError, match="--log mlflow: no login$"):
        RunLog(tmp_path, 0, ["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    extra = r"--log wandb needs the package wandb: .*pip install -e '.\[wandb\]'"
    with pytest.raises(UserError, match=extra):
        check_packages(["tensorboard", "wandb"])
    check_packages(["tensorboard", "none"])


@pytest.mark.usefixtures("wandb", "mlflow")
def test_only_the_main_process_shows_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    write_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert sys.modules["wandb"].begun == []


def test_none_is_metrics_jsonl_alone(tmp_path):
    log = RunLog(tmp_path, 0, ())
    log.write(1, {"loss": 1.0})
    log.picture(1, "x", lambda: pytest.fail("nobody looks at it"))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
