"""Chains of real processes: prefix, order, exit codes, interruption, and the ETA by hand."""

import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moco_det.benchmark import steps
from moco_det.benchmark.steps import Eta, Step


def python(code: str, name="step", kind="kind", expected=10.0) -> Step:
    return Step(name, kind, [sys.executable, "-c", code], expected)


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
    assert steps.announced_eta(line) == seconds


def test_eta_by_hand():
    chain = [python("", kind="a", expected=100), *[python("", kind="b", expected=50)] * 3]
    eta = Eta(chain)
    eta.begin(0, now=0)
    assert eta.left(now=30) == 70 + 150
    eta.hear("ETA 0:00:10", now=30)
    assert eta.left(now=35) == 5 + 150
    assert eta.left(now=60) == 150  # late, but never negative
    assert eta.finish(now=60) == 60
    eta.begin(1, now=60)
    assert eta.left(now=60) == 150
    eta.finish(now=80)
    eta.begin(2, now=80)
    assert eta.left(now=80) == 20 + 20  # steps like this one took 20 seconds


def test_clock():
    assert [steps.clock(s) for s in (5, 245, 3845)] == ["0:05", "4:05", "1:04:05"]


def test_steps_run_in_order_with_prefix_and_log(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: 7.0))  # no time passes
    chain = [
        python("print('one'); print(); print('ETA ' + '0:01:40')", "first"),
        python("", "second"),
    ]
    durations = steps.run_steps(chain, tmp_path / "log")
    printed = capfd.readouterr().out
    assert printed == (tmp_path / "log").read_text()
    lines = printed.splitlines()
    assert durations == [0, 0]
    assert lines[0].startswith("[1/2 first | 0:20 left] $ ")
    assert lines[1].endswith(" left] one")
    assert lines[2] == "[1/2 first | 1:50 left] ETA 0:01:40"
    assert lines[3].startswith("[2/2 second | 0:00 left] $ ")  # as long as the first one


def test_errors_are_streamed_and_end_the_chain(tmp_path, capfd):
    chain = [
        python("import sys; print('reason', file=sys.stderr); sys.exit(3)", "bad"),
        python(f"open({str(tmp_path / 'ran')!r}, 'w')", "never"),
    ]
    with pytest.raises(steps.StepFailed, match="'bad' failed with exit code 3") as failure:
        steps.run_steps(chain, tmp_path / "log")
    assert failure.value.code == 3
    assert not (tmp_path / "ran").exists()
    assert "reason" in capfd.readouterr().out


def test_a_killed_step_has_the_shells_code(tmp_path):
    with pytest.raises(steps.StepFailed) as failure:
        steps.run_steps([python("import os; os.kill(os.getpid(), 9)")], tmp_path / "log")
    assert failure.value.code == 128 + 9


def test_ctrl_c_stops_the_running_step(tmp_path):
    """A real SIGINT to the process that runs the chain; its step must not outlive it.

    The step holds the only writing end of a pipe, so that the pipe's end is the step's.
    """
    held = tmp_path / "held"
    os.mkfifo(held)
    inner = f"import time; pipe = open({str(held)!r}, 'w'); print('begun'); time.sleep(600)"
    outer = (
        "import sys, pathlib, signal; from moco_det.benchmark.steps import Step, run_steps\n"
        # A shell has the commands that it runs in the background ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"run_steps([Step('s', 'k', [sys.executable, '-c', {inner!r}], 1)], "
        f"pathlib.Path({str(tmp_path / 'log')!r}))"
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
        assert ended and os.read(reader, 1) == b"", "the step survived"
    finally:
        process.kill()
        os.close(reader)
