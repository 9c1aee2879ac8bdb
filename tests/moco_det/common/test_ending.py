"""What holds a process up when it should end, and that it does not."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest


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
        from moco_det.common.errors import UserError, exit_cleanly
        ending.SECONDS = 0.1
        ending.start_command()
        multiprocessing.util.Finalize(None, time.sleep, [100], exitpriority=1)
        with exit_cleanly():
            raise UserError("no such file")
    """
    assert ended(script) == (1, "error: no such file\n")


def test_a_clean_up_after_success_takes_its_time():
    script = """
        import multiprocessing.util, time
        from moco_det.common import ending
        from moco_det.common.errors import exit_cleanly
        ending.SECONDS = 0.01
        ending.start_command()
        multiprocessing.util.Finalize(
            None, lambda: (time.sleep(0.3), print("cleaned up")), exitpriority=1
        )
        with exit_cleanly():
            pass
    """
    assert ended(script) == (0, "cleaned up\n")


@pytest.mark.parametrize(
    "command",
    ["pretrain/main.py", "pretrain/linear.py", "pretrain/knn.py", "pretrain/doctor.py"]
    + [f"tools/{name}.py" for name in ("train_net", "convert_to_d2", "visualize", "reproduce")]
    + [f"tools/{name}.py" for name in ("ablate", "quickstart", "check_data", "check_parity")]
    + [f"tools/{name}.py" for name in ("benchmark", "compare")],
)
def test_ctrl_c_during_the_imports_is_one_line(command, repository, tmp_path):
    """The first of the heavy packages is exchanged for one that never ends to be imported."""
    for name in ("torch", "numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text(
            "import time\nprint('importing', flush=True)\ntime.sleep(100)\n"
        )
    process = subprocess.Popen(
        [sys.executable, str(repository / command)],
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
