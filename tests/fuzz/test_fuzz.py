"""A short part of `python -m tests.fuzz`, the same inputs every time: none of them may fail."""

import subprocess
import sys

from paths import REPOSITORY


def test_damaged_files_are_refused_in_a_line_or_read_as_they_are():
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "72", "--seconds", "450"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "\n72 inputs in" in done.stdout
