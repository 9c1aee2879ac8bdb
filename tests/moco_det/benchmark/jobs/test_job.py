"""Job folders: states, the lock, other settings, the end of a log; and what a number came from."""

import fcntl
import os

import pytest

from moco_det.benchmark.jobs import job
from moco_det.benchmark.jobs.job import Command, Job, JobFolder
from moco_det.common.errors import UserError


def make(tmp_path, **identity) -> Job:
    return Job(JobFolder("voc/moco/trial1", tmp_path), [Command("a", ["true"])], identity)


def test_states(tmp_path):
    folder = make(tmp_path).folder
    assert folder.state() == "to do"
    for state in ("finished", "failed", "interrupted"):
        folder.write_record({"state": state})
        assert folder.state() == state


def test_a_job_is_running_as_long_as_its_lock_is_held(tmp_path):
    folder = make(tmp_path).folder
    folder.write_record({"state": "running"})
    with open(folder.path / "run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.state() == "running"
    assert folder.state() == "interrupted"  # its processes are gone and have told no end


def test_the_lock_is_for_one(tmp_path):
    folder, said = make(tmp_path).folder, []
    with folder.claimed() as lock:
        assert lock >= 0
        stopped = iter([False, False, False, True])
        with make(tmp_path).folder.claimed(lambda: next(stopped), said.append) as other:
            assert other == -1
    assert said == ["voc/moco/trial1: another process is at it; waiting for its end"]
    with folder.claimed() as lock:
        assert lock >= 0


def test_the_end_of_a_log(tmp_path):
    folder = make(tmp_path).folder
    assert folder.log_end() == []
    folder.make()
    folder.log.write_text("\n".join(map(str, range(30))) + "\n\n")
    assert folder.log_end() == [str(n) for n in range(30 - job.LOG_LINES, 30)]


def test_other_settings_are_refused_and_named(tmp_path):
    make(tmp_path, lr=1).folder.write_record({"state": "finished", "identity": {"lr": 1}})
    make(tmp_path, lr=1).check_identity()
    with pytest.raises(UserError, match="lr was 1, is 2; seed was None, is 0"):
        make(tmp_path, lr=2, seed=0).check_identity()


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[]", "no record of a run")])
def test_a_record_that_is_none_is_named(tmp_path, text, reason):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=f"run.json.* {reason}.*: remove that folder"):
        make(tmp_path).folder.state()


def test_an_earlier_version_s_record_is_read_where_there_is_no_other(tmp_path):
    folder = JobFolder("draw", tmp_path, lambda: {"state": "finished"})
    assert folder.state() == "finished"
    folder.write_record({"state": "failed"})
    assert folder.state() == "failed"


def test_it_names_code_packages_and_machine():
    found = job.provenance()
    assert set(found) == {"code", "packages", "hardware"}
    assert found["code"]["moco_det"] and found["code"]["commit"]
    assert {"python", "torch", "torchvision", "pycocotools"} <= set(found["packages"])
    assert "core" in found["hardware"]["processor"]
    assert job.environment()["torch"] == found["packages"]["torch"]


def test_what_is_not_installed_is_left_out():
    assert job.version("no-such-package") is None


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "PACKAGE", tmp_path / "nowhere")
    assert job.commit() == "unknown"


DAMAGES = [
    b"", b'{"state": "fin', bytes(64), b"\xff\xfe", b'{"state": NaN}', b"[" * 5000, b'{"state": 5}',
    b'{"state": "x"}', b'{"attempts": [3]}', b'{"attempts": {}}', b'{"seconds": "1"}',
    b'{"identity": []}', b'{"hardware": "x"}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGES)
def test_a_damaged_record_is_unreadable_and_says_why(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    found = make(tmp_path).folder.look()
    assert (found.state, found.record) == ("unreadable", {})
    assert f"{tmp_path}/run.json" in found.problem and found.problem.endswith("remove that folder")
    assert len(found.problem.splitlines()) == 1


@pytest.mark.parametrize("what", ["folder", "fifo", "loop"])
def test_a_record_that_is_no_file_is_unreadable(tmp_path, what):
    path = tmp_path / "run.json"
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}[
        what
    ]()
    assert make(tmp_path).folder.look().state == "unreadable"


def test_a_look_is_the_state_and_the_record(tmp_path):
    folder = make(tmp_path).folder
    assert folder.look() == job.Look("to do", {})
    folder.write_record({"state": "failed", "seconds": 1.5})
    assert folder.look() == job.Look("failed", {"state": "failed", "seconds": 1.5})


def test_a_damaged_record_of_an_earlier_version_is_unreadable(tmp_path):
    def lacking():
        return {"identity": {}["settings"]}

    folder = JobFolder("a", tmp_path, lacking)
    assert "lack 'settings': remove that folder" in folder.look().problem


def test_a_record_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    folder, calls = make(tmp_path).folder, []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("flushed"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("renamed"), replace(a, b)))
    folder.write_record({"state": "running"})
    assert calls == ["flushed", "renamed"]
