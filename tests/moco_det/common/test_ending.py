"""What holds a process up when it should end, and that it does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from moco_det.common import ending


def ended(script: str) -> tuple[int, str]:
    """Exit code and output of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


# A child as a loader's worker is: it ignores what Python sends it before waiting for its end.
DEAF_CHILD = """
    import multiprocessing, os, signal, time
    def sleep(ready):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready.set()
        time.sleep(100)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    context.Process(target=sleep, args=(ready,), daemon=True).start()
    ready.wait()
"""


@pytest.mark.parametrize("end", ["", "    raise ZeroDivisionError"])
def test_a_child_that_ignores_sigterm_does_not_outlive_its_process(end):
    prepared = "    from moco_det.common.ending import prepare_end\n    prepare_end()\n"
    code, text = ended(f"{DEAF_CHILD}{prepared}{end}")
    assert code == (1 if end else 0)
    assert ("ZeroDivisionError" in text) == bool(end)


def test_a_clean_up_that_waits_for_ever_is_cut_short():
    script = """
        import multiprocessing.util, time
        from moco_det.common import ending
        from moco_det.common.errors import UserError, exit_cleanly, start_command
        ending.SECONDS = 0.1
        start_command(lambda arguments: None)
        multiprocessing.util.Finalize(None, time.sleep, [100], exitpriority=1)
        with exit_cleanly():
            raise UserError("no such file")
    """
    assert ended(script) == (1, "error: no such file\n")


def test_a_clean_up_after_success_takes_its_time():
    script = """
        import multiprocessing.util, time
        from moco_det.common import ending
        from moco_det.common.errors import exit_cleanly, start_command
        ending.SECONDS = 0.01
        start_command(lambda arguments: None)
        multiprocessing.util.Finalize(
            None, lambda: (time.sleep(0.3), print("cleaned up")), exitpriority=1
        )
        with exit_cleanly():
            pass
    """
    assert ended(script) == (0, "cleaned up\n")


CONFIG = "--config-file x.yaml"


@pytest.mark.parametrize(
    "command",
    [
        "pretrain/main.py x",
        "pretrain/linear.py x",
        "pretrain/knn.py x --pretrained x",
        "pretrain/doctor.py x",
        f"tools/train_net.py {CONFIG}",
        "tools/convert_to_d2.py x x",
        "tools/visualize.py --dataset x",
        "tools/reproduce.py",
        "tools/ablate.py x --data x",
        "tools/quickstart.py",
        f"tools/check_data.py {CONFIG}",
        f"tools/check_parity.py {CONFIG}",
        "tools/benchmark.py knn-bank",
        "tools/compare.py x=x",
    ],
)
def test_ctrl_c_during_the_imports_is_one_line(command, repository, tmp_path):
    """The first of the heavy packages is exchanged for one that never ends to be imported."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(
            "import time\nprint('importing', flush=True)\ntime.sleep(100)\n"
        )
    script, *arguments = command.split()
    process = subprocess.Popen(
        [sys.executable, str(repository / script), *arguments],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert time.monotonic() - begun < 10


# -- whoever reads what is printed ----------------------------------------------------------------


def unread(*arguments: str) -> tuple[int, str]:
    """Exit code and errors of Python where nobody reads its output, as behind `| head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(writer, "wb") as output:
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=buffered,
        )
    return done.returncode, done.stderr


PRINTING = """
from moco_det.common.errors import exit_cleanly, start_command
start_command(lambda arguments: None)
with exit_cleanly():
    for number in range({lines}):
        print(number)
"""


@pytest.mark.parametrize(("lines", "code"), [(3, 0), (100_000, 141)])
def test_output_that_nobody_reads_is_no_error(lines, code):
    """What is printed stays in a buffer of Python's to the end, where it is not much."""
    assert unread("-c", PRINTING.format(lines=lines)) == (code, "")


def test_help_that_nobody_reads_is_no_error(repository):
    assert unread("-m", "moco_det", "--help") == (0, "")
    assert unread("-u", "-m", "moco_det", "--help") == (141, "")
    assert unread(str(repository / "tools/compare.py"), "--help") == (0, "")


# -- torchrun's processes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "consequence", "seconds"),
    [
        ({}, True, None),
        ({"LOCAL_RANK": "1"}, False, None),  # no torchrun
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, False, None),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"}, False, 5.3),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "7"}, False, 7.1),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, True, 10.0),  # after its cause
    ],
)
def test_of_processes_that_fail_alike_the_first_speaks(
    environment, consequence, seconds, monkeypatch
):
    slept = []
    monkeypatch.setattr(ending.time, "sleep", slept.append)
    monkeypatch.setattr(ending, "_set_handler", lambda number, handler: None)
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ending.await_turn(consequence)
    assert slept == ([] if seconds is None else [pytest.approx(seconds)])
