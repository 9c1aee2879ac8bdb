"""Run folders: states, what metrics.json tells after kills, the lock, other settings."""

import fcntl
import json
from pathlib import Path

import pytest

from moco_det.benchmark.jobs import runs
from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.runs import RunFolder, check_identity, identity
from moco_det.common.errors import UserError

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)


def make(tmp_path, trial=1, options=(), config="configs/voc_moco.yaml"):
    return RunFolder(Run(EXPERIMENT, "moco", trial, Path(config), tuple(options)), tmp_path)


def write_metrics(folder, *lines):
    folder.path.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.path / "metrics.json").write_text(text)


def trained(iteration, loss):
    return {"iteration": iteration, "lr": 0.1, "total_loss": loss}


def test_states(tmp_path):
    folder = make(tmp_path)
    assert folder.state() == "to do"
    for state in ("finished", "failed", "interrupted"):
        folder.write_record({"state": state})
        assert folder.state() == state


def test_a_run_is_running_as_long_as_its_lock_is_held(tmp_path):
    folder = make(tmp_path)
    folder.write_record({"state": "running"})
    with open(folder.path / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.state() == "running"
    assert folder.state() == "interrupted"  # its processes are gone and have told no end


def test_the_lock_is_for_one(tmp_path):
    folder, said = make(tmp_path), []
    with folder.claimed() as lock:
        assert lock >= 0
        stopped = iter([False, False, False, True])
        with make(tmp_path).claimed(lambda: next(stopped), said.append) as other:
            assert other == -1
    assert said == ["voc/moco/trial1: another process is at it; waiting for its end"]
    with folder.claimed() as lock:
        assert lock >= 0


def test_a_resumed_run_repeats_lines(tmp_path):
    folder = make(tmp_path)
    lines = [
        trained(19, 5.0),
        trained(39, 4.0),
        trained(59, 3.0),
        trained(39, 4.5),
        trained(59, 3.5),
    ]
    write_metrics(folder, *lines)
    assert folder.losses() == [(20, 5.0), (40, 4.5), (60, 3.5)]
    assert folder.iteration() == 60


def test_results_are_the_last_evaluation_s(tmp_path):
    folder = make(tmp_path)
    assert folder.results() == {}
    write_metrics(
        folder,
        trained(19, 5.0),
        {"iteration": 19, "bbox/AP": 1.0},
        trained(39, 4.0),
        {"iteration": 40, "bbox/AP": 2.0, "segm/AP": 3.0, "bbox/AP-cat": None},
    )
    assert folder.results() == {"bbox/AP": 2.0, "segm/AP": 3.0}


def test_a_line_that_a_kill_has_cut_off_is_dropped(tmp_path):
    folder = make(tmp_path)
    write_metrics(folder, trained(19, 5.0))
    path = folder.path / "metrics.json"
    path.write_text(path.read_text() + '{"iteration": 39, "lr": 0.')
    assert folder.losses() == [(20, 5.0)]
    folder.repair()
    with path.open("a") as file:
        file.write(json.dumps(trained(39, 4.0)) + "\n")
    assert folder.losses() == [(20, 5.0), (40, 4.0)]


def test_a_run_of_other_settings_is_refused(tmp_path):
    folder = make(tmp_path, options=["SOLVER.MAX_ITER", "10"])
    folder.write_record({"state": "finished", "identity": identity(folder.run, "native")})
    check_identity(folder, identity(folder.run, "native"))
    longer = make(tmp_path)
    with pytest.raises(UserError, match=r"options was \{'SOLVER.MAX_ITER': '10'\}, is \{\}"):
        check_identity(longer, identity(longer.run, "native"))
    with pytest.raises(UserError, match="engine was native, is detectron2"):
        check_identity(folder, identity(folder.run, "detectron2"))


def test_weights_are_known_by_their_content(tmp_path):
    one, two = tmp_path / "one.pkl", tmp_path / "two.pkl"
    one.write_bytes(b"a")
    two.write_bytes(b"a")
    same = [
        identity(make(tmp_path, options=["MODEL.WEIGHTS", str(path)]).run, "native")
        for path in (one, two)
    ]
    assert same[0] == same[1]
    # sha256 of "a"
    assert same[0]["weights"].startswith("sha256:ca978112ca1bbdcafac231b39a23dc4d")
    two.write_bytes(b"b")
    other = make(tmp_path, options=["MODEL.WEIGHTS", str(two)])
    assert identity(other.run, "native") != same[0]


def test_the_end_of_a_log(tmp_path):
    folder = make(tmp_path)
    assert folder.log_end() == []
    folder.path.mkdir(parents=True)
    folder.log.write_text("\n".join(map(str, range(30))) + "\n\n")
    assert folder.log_end() == [str(n) for n in range(30 - runs.LOG_LINES, 30)]
