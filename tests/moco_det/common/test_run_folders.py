"""One run in a folder: who holds it, what it holds, what is left of others."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys

import pytest

from moco_det.common.errors import UserError
from moco_det.common.run_folders import LOCK, LOCK_WITHOUT_LOCKS, RunFiles, claimed

FILES = RunFiles(marks=("run_*.pth",), others=("log*",), flag="--output", resume="--resume auto")
NOBODY = 2**22 + 1  # above the highest process id of Linux


def claim(folder, new=True, overwrite=False, reads=()):
    return claimed(folder, FILES, new, overwrite, reads)


def in_another_process(folder) -> subprocess.CompletedProcess:
    script = (
        "import sys\nsys.path.insert(0, sys.argv[2])\nfrom test_run_folders import claim\n"
        "with claim(sys.argv[1]):\n    print('held')"
    )
    argv = [sys.executable, "-c", script, str(folder), os.path.dirname(__file__)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_another_process_is_refused_while_it_is_held_and_told_by_whom(tmp_path):
    folder = tmp_path / "below" / "output"
    with claim(folder):
        refused = in_another_process(folder)
    words = f"--output {folder} is in use by process {os.getpid()} on {socket.gethostname()}: "
    assert words in refused.stderr
    assert refused.stdout == ""
    assert in_another_process(folder).stdout == "held\n"


def test_a_child_that_outlives_its_process_does_not_hold_it(tmp_path):
    """As a loader's workers do for a moment after a kill; they have inherited the open file."""
    with claim(tmp_path):
        child = os.fork()
        if not child:
            os.execlp("sleep", "sleep", "100")
    try:
        assert in_another_process(tmp_path).stdout == "held\n"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks(tmp_path):
    with claim(tmp_path):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*; if that"):
            claim(tmp_path).__enter__()
        assert (tmp_path / LOCK_WITHOUT_LOCKS).exists()
    assert not (tmp_path / LOCK_WITHOUT_LOCKS).exists()
    for owner in (f"{NOBODY} {socket.gethostname()}", f"{os.getpid()} elsewhere"):
        (tmp_path / LOCK_WITHOUT_LOCKS).write_text(owner)
        if "elsewhere" in owner:
            with pytest.raises(UserError, match="on elsewhere: .* remove .*lock.pid"):
                claim(tmp_path).__enter__()
        else:  # killed
            with claim(tmp_path):
                pass


def test_a_folder_with_another_run_is_refused_until_it_may_be_deleted(tmp_path):
    for name in ("run_1.pth", "log.txt", "notes.txt"):
        (tmp_path / name).write_text("")
    words = (
        f"--output {tmp_path} holds a run (run_1.pth): go on with --resume auto, begin anew with "
        "--overwrite, which deletes it, or name another --output"
    )
    with pytest.raises(UserError, match=re.escape(words)), claim(tmp_path):
        pass
    with claim(tmp_path, new=False):
        assert (tmp_path / "run_1.pth").exists()
    with pytest.raises(UserError, match="--overwrite would delete .*run_1.pth, which this run"):
        claim(tmp_path, overwrite=True, reads=[str(tmp_path / "run_1.pth")]).__enter__()
    with claim(tmp_path, overwrite=True):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, "notes.txt"}


def test_a_log_alone_is_no_run_to_keep(tmp_path):
    (tmp_path / "log.txt").write_text("")
    with claim(tmp_path):
        assert (tmp_path / "log.txt").exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    left, written = f".run_1.{NOBODY}.tmp.pth", f".run_2.{os.getpid()}.tmp.pth"
    for name in (left, written, ".hidden.tmp", "a.tmp"):
        (tmp_path / name).write_text("half")
    with claim(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {LOCK, written, ".hidden.tmp", "a.tmp"}


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --output .*file: File exists"):
        claim(tmp_path / "file").__enter__()
