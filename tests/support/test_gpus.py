import os
import subprocess
import sys

import gpus
import torch


def test_tests_and_their_commands_see_no_gpu(monkeypatch):
    seen = (torch.cuda.is_available(), torch.cuda.device_count())
    assert seen == (False, 0)
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_a_test_marked_gpu_sees_what_was_found(monkeypatch):
    monkeypatch.setattr(gpus, "_found", (lambda: True, lambda: 3, "5,6,7"))
    try:
        gpus.show_gpus()
        seen = torch.cuda.is_available(), torch.cuda.device_count(), os.environ[gpus.VISIBLE]
    finally:
        gpus.hide_gpus()
    assert seen == (True, 3, "5,6,7")
    assert (torch.cuda.is_available(), os.environ[gpus.VISIBLE]) == (False, "")
