"""Real processes in place of a training: ends, retries, stops, and a starter that is killed."""

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moco_det.benchmark.execution import Execution, Settings, reasons
from moco_det.benchmark.grid import Experiment, Run
from moco_det.benchmark.local import run_locally
from moco_det.benchmark.runs import RunFolder
from moco_det.errors import UserError

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)
# Writes a line to `begun` at every start, then does `body`; `finish()` is an evaluation, and
# `wait_until()` fails rather than wait for ever.
FAKE = """
import json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "begun", "a") as file:
    print(os.getpid(), file=file)
starts = len((folder / "begun").read_text().split())
def finish():
    with open(folder / "metrics.json", "a") as file:
        print(json.dumps({{"iteration": 9, "bbox/AP": 50.0}}), file=file)
def wait_until(happened):
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
{body}
"""


@pytest.fixture
def run():
    return Run(EXPERIMENT, "moco", 1, Path("configs/voc_moco.yaml"), ())


def execution(tmp_path, run, body, retries=1, said=None):
    settings = Settings(Path(__file__).parents[3], tmp_path, "native", retries=retries)
    command = [sys.executable, "-c", FAKE.format(folder=str(settings.folder(run).path), body=body)]
    said = [] if said is None else said
    return Execution(run, settings, command=command, say=said.append)


def starts(tmp_path, run):
    return len((RunFolder(run, tmp_path).path / "begun").read_text().split())


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def test_a_finished_run_is_not_run_again(tmp_path, run):
    assert execution(tmp_path, run, "finish()").carry_out() == "finished"
    assert execution(tmp_path, run, "finish()").carry_out() == "finished"
    assert starts(tmp_path, run) == 1


def test_the_record_says_what_was_run(tmp_path, run):
    execution(tmp_path, run, "print('hello'); finish()").carry_out()
    folder = RunFolder(run, tmp_path)
    record = folder.record
    assert record["state"] == "finished"
    assert record["engine"] == "native" and record["seed"] == 1
    assert record["config_file"] == "configs/voc_moco.yaml"
    assert shlex.split(record["command"])[0] == sys.executable
    assert record["code"]["commit"] and record["packages"]["torch"]
    assert "cores" in record["hardware"]["processor"]
    assert [attempt["code"] for attempt in record["attempts"]] == [0]
    assert record["seconds"] == record["attempts"][0]["seconds"] > 0
    assert "hello" in folder.log_end()


@pytest.mark.parametrize(("retries", "state", "count"), [(2, "finished", 3), (1, "failed", 2)])
def test_a_failed_run_is_tried_again_so_often(tmp_path, run, retries, state, count):
    body = "print('reason', starts)\nif starts < 3: sys.exit(4)\nfinish()"
    said = []
    job = execution(tmp_path, run, body, retries, said)
    assert job.carry_out() == state
    assert starts(tmp_path, run) == count
    assert len(said) == min(retries, 2)
    if state == "failed":
        lines = reasons(job.folder)
        assert "exit code 4" in lines[0]
        assert lines[-1] == "reason 2"


def test_a_command_that_evaluates_nothing_has_failed(tmp_path, run):
    job = execution(tmp_path, run, "pass", retries=0)
    assert job.carry_out() == "failed"
    assert "evaluated nothing" in reasons(job.folder)[0]


def test_a_preempted_run_is_interrupted_and_not_retried(tmp_path, run):
    assert execution(tmp_path, run, "sys.exit(75)").carry_out() == "interrupted"
    assert starts(tmp_path, run) == 1
    assert execution(tmp_path, run, "finish()").carry_out() == "finished"


def test_a_stopped_run_may_save_its_checkpoint(tmp_path, run):
    body = (
        "import signal\n"
        "def save(*_):\n    (folder / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n(folder / 'ready').touch()\ntime.sleep(600)"
    )
    job = execution(tmp_path, run, body)
    thread = threading.Thread(target=job.carry_out)
    thread.start()
    wait_for(job.folder.path / "ready")
    assert job.folder.state() == "running"
    job.stop()
    thread.join(120)
    assert (job.folder.path / "saved").exists()
    assert job.folder.state() == "interrupted"


def test_a_run_that_outlives_its_starter_is_waited_for(tmp_path, run, monkeypatch):
    """The starter is killed; its command goes on, and must not get a second one beside it."""
    body = (
        "(folder / 'ready').touch()\n"
        "wait_until((folder / 'waited for').exists)\n"
        "finish()\n(folder / 'ended').touch()"
    )
    starter = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import test_execution as t\n"
        "run = t.Run(t.EXPERIMENT, 'moco', 1, Path('configs/voc_moco.yaml'), ())\n"
        f"t.execution(Path({str(tmp_path)!r}), run, {body!r}).carry_out()"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    folder = RunFolder(run, tmp_path)
    wait_for(folder.path / "ready")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.state() == "running"
    said, looks = [], []

    def look_again(seconds):
        """The run ends when the second one has said that it waits, and then has waited."""
        looks.extend(said)
        if len(looks) == 3:
            (folder.path / "waited for").touch()
        time.sleep(0.01)

    monkeypatch.setattr("moco_det.benchmark.runs.time", SimpleNamespace(sleep=look_again))
    second = execution(tmp_path, run, "assert (folder / 'ended').exists()\nfinish()", 0, said)
    assert second.carry_out() == "finished"
    assert len(said) == 1 and "another process" in said[0]
    assert starts(tmp_path, run) == 2


def test_a_folder_of_other_settings_is_refused(tmp_path, run):
    execution(tmp_path, run, "finish()").carry_out()
    other = Run(EXPERIMENT, "moco", 1, run.config_file, ("SOLVER.MAX_ITER", "3"))
    with pytest.raises(UserError, match="other settings"):
        execution(tmp_path, other, "finish()").carry_out()


def test_local_runs_share_the_places(tmp_path, monkeypatch):
    """Three runs in two places: each place holds one at a time, and both are used at once.

    The first run ends once the third has begun, which must then be in the second one's place.
    """
    runs = [Run(EXPERIMENT, "moco", trial, Path("c.yaml"), ()) for trial in (1, 2, 3)]
    body = (
        # One clock for all processes of the machine, on which no one sets the time.
        "now = lambda: time.clock_gettime(time.CLOCK_MONOTONIC); begin = now()\n"
        f"root = pathlib.Path({str(tmp_path)!r}); (root / f'begun{{trial}}').touch()\n"
        "wait_until((root / f'begun{ {1: 3, 2: 1, 3: 2}[trial] }').exists)\n"
        "finish()\n"
        "(folder / 'where').write_text(json.dumps([os.environ['PLACE'], begin, now()]))"
    )

    def command(self, run):
        return execution(tmp_path, run, f"trial = {run.trial}\n{body}").command

    monkeypatch.setattr(Settings, "command", command)
    settings = Settings(Path(__file__).parents[3], tmp_path, "native", retries=0)
    assert run_locally(runs, settings, [{"PLACE": "a"}, {"PLACE": "b"}]) == []
    spans = {"a": [], "b": []}
    for run in runs:
        place, begin, end = json.loads((RunFolder(run, tmp_path).path / "where").read_text())
        spans[place].append((begin, end))
    assert sorted(map(len, spans.values())) == [1, 2]
    for times in spans.values():
        times.sort()
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))
