"""Real processes in place of a training: ends, retries, stops, and a starter that is killed; what
the screen shows, the ETA by hand, and which part of the machine a job gets."""

import dataclasses
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moco_det.benchmark.jobs import runner
from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.job import Command, Job, JobFolder
from moco_det.benchmark.jobs.runner import (
    Eta,
    Execution,
    JobFailed,
    gpu_slots,
    reasons,
    run_in_order,
    run_side_by_side,
)
from moco_det.benchmark.jobs.runs import RunFolder, Settings
from moco_det.common.errors import UserError

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)
# Writes a line to `begun` at every start, then does `body`; `finish()` is an evaluation.
FAKE = """
import json, os, pathlib, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "begun", "a") as file:
    print(os.getpid(), file=file)
starts = len((folder / "begun").read_text().split())
def finish():
    with open(folder / "metrics.json", "a") as file:
        print(json.dumps({{"iteration": 9, "bbox/AP": 50.0}}), file=file)
{body}
"""


@pytest.fixture
def run():
    return Run(EXPERIMENT, "moco", 1, Path("configs/voc_moco.yaml"), ())


def job_of(tmp_path, run, body) -> Job:
    settings = Settings(tmp_path, "native")
    argv = [sys.executable, "-c", FAKE.format(folder=str(settings.folder(run).path), body=body)]
    return dataclasses.replace(settings.job(run), commands=[Command("voc", argv)])


def execution(tmp_path, run, body, retries=1, said=None):
    said = [] if said is None else said
    return Execution(job_of(tmp_path, run, body), retries, notify=said.append)


def starts(tmp_path, run):
    return len((RunFolder(run, tmp_path).path / "begun").read_text().split())


def wait_for(path, seconds=20):
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
    assert re.search(r", \d+ cores?$", record["hardware"]["processor"])
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
        lines = reasons(job.job.folder)
        assert "exit code 4" in lines[0]
        assert lines[-1] == "reason 2"


def test_a_command_that_evaluates_nothing_has_failed(tmp_path, run):
    job = execution(tmp_path, run, "pass", retries=0)
    assert job.carry_out() == "failed"
    assert "evaluated nothing" in reasons(job.job.folder)[0]


def test_a_preempted_run_is_interrupted_and_not_retried(tmp_path, run):
    assert execution(tmp_path, run, "sys.exit(75)").carry_out() == "interrupted"
    assert starts(tmp_path, run) == 1
    assert execution(tmp_path, run, "finish()").carry_out() == "finished"


def test_a_stopped_run_may_save_its_checkpoint(tmp_path, run):
    body = (
        "import signal\n"
        "def save(*_):\n    (folder / 'saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n(folder / 'ready').touch()\ntime.sleep(60)"
    )
    job = execution(tmp_path, run, body)
    thread = threading.Thread(target=job.carry_out)
    thread.start()
    wait_for(job.job.folder.path / "ready")
    assert job.job.folder.state() == "running"
    job.stop()
    thread.join(20)
    assert (job.job.folder.path / "saved").exists()
    assert job.job.folder.state() == "interrupted"


def test_a_run_that_outlives_its_starter_is_waited_for(tmp_path, run):
    """The starter is killed; its command goes on, and must not get a second one beside it."""
    body = "(folder / 'ready').touch()\ntime.sleep(2)\nfinish()\n(folder / 'ended').touch()"
    starter = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "import test_runner as t\n"
        "run = t.Run(t.EXPERIMENT, 'moco', 1, Path('configs/voc_moco.yaml'), ())\n"
        f"t.execution(Path({str(tmp_path)!r}), run, {body!r}).carry_out()"
    )
    process = subprocess.Popen([sys.executable, "-c", starter])
    folder = RunFolder(run, tmp_path)
    wait_for(folder.path / "ready", 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.state() == "running"
    said = []
    second = execution(tmp_path, run, "assert (folder / 'ended').exists()\nfinish()", 0, said)
    assert second.carry_out() == "finished"
    assert len(said) == 1 and "another process" in said[0]
    assert starts(tmp_path, run) == 2


def test_a_folder_of_other_settings_is_refused(tmp_path, run):
    execution(tmp_path, run, "finish()").carry_out()
    other = Run(EXPERIMENT, "moco", 1, run.config_file, ("SOLVER.MAX_ITER", "3"))
    with pytest.raises(UserError, match="other settings"):
        execution(tmp_path, other, "finish()").carry_out()


def test_jobs_side_by_side_share_the_slots(tmp_path):
    """Three runs in two slots: each slot holds one at a time."""
    runs = [Run(EXPERIMENT, "moco", trial, Path("c.yaml"), ()) for trial in (1, 2, 3)]
    body = "begin = time.time(); time.sleep(0.5); finish()\n"
    body += "(folder / 'where').write_text(json.dumps([os.environ['SLOT'], begin, time.time()]))"
    jobs = [job_of(tmp_path, run, body) for run in runs]
    assert run_side_by_side(jobs, [{"SLOT": "a"}, {"SLOT": "b"}]) == []
    spans = {"a": [], "b": []}
    for run in runs:
        slot, begin, end = json.loads((RunFolder(run, tmp_path).path / "where").read_text())
        spans[slot].append((begin, end))
    assert sorted(map(len, spans.values())) == [1, 2]
    for times in spans.values():
        times.sort()
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))


def python(code: str, name="step", seconds=10.0) -> Command:
    return Command(name, [sys.executable, "-c", code], seconds)


def run_chain(folder: Path, *commands: Command) -> None:
    """Each command as a job of its own."""
    run_in_order([Job(JobFolder(c.name, folder / c.name), [c]) for c in commands])


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("epoch 1/3  data 0%  ETA 0:03:12", 192),
        ("eta: 1:00:05  iter: 19  total_loss: 3", 3605),
        ("eta: 1 day, 2:00:00  iter: 19", 26 * 3600),
        ("eta: 12 days, 0:00:01", 12 * 86400 + 1),
        ("beta: 0:00:01", None),
        ("iter: 19", None),
    ],
)
def test_announced_eta(line, seconds):
    assert runner.announced_eta(line) == seconds


def test_eta_by_hand(tmp_path):
    job = Job(
        JobFolder("chain", tmp_path),
        [python("", "a", 100), *(python("", "b", 50) for _ in range(3))],
    )
    eta, (first, second, third, _) = Eta([job]), job.commands
    eta.begin(first, now=0)
    assert eta.left(now=30) == 70 + 150
    eta.hear(first, "ETA 0:00:10", now=30)
    assert eta.left(now=35) == 5 + 150
    assert eta.left(now=60) == 150  # late, but never negative
    assert eta.finish(first, now=60) == 60
    eta.begin(second, now=60)
    assert eta.left(now=60) == 150
    eta.finish(second, now=80)
    eta.begin(third, now=80)
    assert eta.left(now=80) == 20 + 20  # commands like this one took 20 seconds
    eta.drop(job)
    assert eta.left(now=80) == 0


def test_eta_of_jobs_side_by_side(tmp_path):
    """Nobody knows how long the first take; later ones are like those of their name, or of any."""
    names = ("voc", "voc", "coco", "voc")
    jobs = [Job(JobFolder(n, tmp_path), [python("", n, None)]) for n in names]
    (first, second, _, _), eta = [job.commands[0] for job in jobs], Eta(jobs, at_a_time=2)
    eta.begin(first, now=0)
    eta.begin(second, now=0)
    assert eta.left(now=10) is None
    eta.finish(first, now=40)
    assert eta.left(now=40) == (0 + 40 + 40) / 2
    eta.hear(second, "eta: 0:00:30  iter: 19", now=40)
    assert eta.left(now=50) == (20 + 40 + 40) / 2


def test_clock():
    assert [runner.clock(s) for s in (5, 245, 3845)] == ["0:05", "4:05", "1:04:05"]


def test_jobs_run_in_order_with_prefix_and_log(tmp_path, capfd):
    run_chain(
        tmp_path,
        python("print('one'); print(); print('ETA ' + '0:01:40')", "first"),
        python("", "second"),
    )
    lines = capfd.readouterr().out.splitlines()
    logs = "".join((tmp_path / name / "log.txt").read_text() for name in ("first", "second"))
    assert [line.split("] ", 1)[1] for line in lines] == [s for s in logs.splitlines() if s]
    assert lines[0].startswith("[1/2 first | 0:20 left] $ ")
    assert lines[1].endswith(" left] one")
    assert lines[2] == "[1/2 first | 1:50 left] ETA 0:01:40"
    assert lines[3].startswith("[2/2 second | 0:10 left] $ ")
    run_chain(tmp_path, python("", "first"), python("", "second"))
    assert capfd.readouterr().out == ""  # both are done


def test_commands_of_one_job_run_in_order(tmp_path, capfd):
    commands = [python("print('one')", "first"), python("print('two')", "second")]
    job = Job(JobFolder("job", tmp_path), commands)
    run_in_order([job])
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["[1/2 first"] * 2 + ["[2/2 second"] * 2
    assert job.folder.record["command"] == " && ".join(c.as_typed() for c in commands)
    assert [attempt["code"] for attempt in job.folder.record["attempts"]] == [0]


def test_errors_are_streamed_and_end_the_chain(tmp_path, capfd):
    bad = python("import sys; print('reason', file=sys.stderr); sys.exit(3)", "bad")
    never = python(f"open({str(tmp_path / 'ran')!r}, 'w')", "never")
    with pytest.raises(JobFailed, match="'bad' failed with exit code 3") as failure:
        run_chain(tmp_path, bad, never)
    assert failure.value.code == 3
    assert not (tmp_path / "ran").exists()
    assert "reason" in capfd.readouterr().out


def test_a_job_without_a_result_has_failed(tmp_path):
    job = Job(JobFolder("job", tmp_path), [python("")], read_result=lambda: None)
    with pytest.raises(JobFailed, match="'step' left no result") as failure:
        run_in_order([job])
    assert failure.value.code == 1
    assert job.folder.state() == "failed"


def test_a_killed_command_has_the_shells_code(tmp_path):
    with pytest.raises(JobFailed) as failure:
        run_chain(tmp_path, python("import os; os.kill(os.getpid(), 9)"))
    assert failure.value.code == 128 + 9


def test_ctrl_c_stops_the_running_command(tmp_path):
    """A real SIGINT to the process that runs the chain; its command must not outlive it.

    The command holds the only writing end of a pipe, so that the pipe's end is the command's.
    """
    held = tmp_path / "held"
    os.mkfifo(held)
    inner = f"import time; pipe = open({str(held)!r}, 'w'); print('begun'); time.sleep(600)"
    outer = (
        f"import signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_runner as t\n"
        # A shell has the commands that it runs in the background ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"t.run_chain(t.Path({str(tmp_path)!r}), t.python({inner!r}))"
    )
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", outer],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert any("] begun" in line for line in process.stdout)
        assert not select.select([reader], [], [], 0)[0]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
        assert process.returncode not in (0, None)
        ended, _, _ = select.select([reader], [], [], 120)
        assert ended and os.read(reader, 1) == b"", "the command survived"
    finally:
        process.kill()
        os.close(reader)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def devices(found):
    return [slot["CUDA_VISIBLE_DEVICES"] for slot in found]


def test_gpus_are_dealt_out_in_groups(gpus):
    gpus(8)
    assert devices(gpu_slots(1, None)) == list("01234567")
    assert devices(gpu_slots(4, None)) == ["0,1,2,3", "4,5,6,7"]
    assert devices(gpu_slots(3, None)) == ["0,1,2", "3,4,5"]  # two are left over
    assert devices(gpu_slots(2, 3)) == ["0,1", "2,3", "4,5"]


def test_only_visible_gpus_are_used(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert devices(gpu_slots(1, None)) == ["5", "GPU-7"]


def test_too_few_gpus_are_told(gpus):
    gpus(2)
    with pytest.raises(UserError, match="--gpus-per-run 4: only 2 are visible"):
        gpu_slots(4, None)


def test_without_gpus_the_cores_are_shared(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(runner, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert gpu_slots(1, None) == [{"OMP_NUM_THREADS": "8"}]
    assert gpu_slots(1, 2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert gpu_slots(2, 2) == [{"OMP_NUM_THREADS": "2"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert gpu_slots(1, 2) == [{}, {}]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("print('error: no such data set'); sys.exit(1)", 1),
        ("print('x.py: error: unrecognized arguments'); sys.exit(2)", 1),
        ("print('Traceback'); sys.exit(1)", 3),
        ("print('error: one'); print('and on'); sys.exit(1)", 3),
    ],
)
def test_a_user_s_error_is_not_tried_again(tmp_path, run, body, count):
    job = execution(tmp_path, run, body, retries=2)
    assert job.carry_out() == "failed"
    assert starts(tmp_path, run) == count


def test_a_result_that_cannot_be_read_is_a_failure_of_that_run(tmp_path, run):
    said = []
    job = execution(tmp_path, run, "(folder / 'metrics.json').write_text('x\\n{}')", 0, said)
    assert job.carry_out() == "failed"
    assert len(said) == 1 and "metrics.json, line 1 is no JSON" in said[0]
