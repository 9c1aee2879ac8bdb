"""What became of a child is told apart: each kind of end from a child that ends so."""

import os
import signal
import sys
import time

import pytest

from moco_det.common.errors import UserError, exit_cleanly
from tests.fuzz import sandbox
from tests.fuzz.sandbox import canary, run_all, run_call


def refuse(message):
    with exit_cleanly():
        raise UserError(message)


def fail(folder):
    raise KeyError("id")


ENDS = {
    "ok": lambda folder: print("fine"),
    "refused": lambda folder: refuse("a.json: annotation 1 has no id"),
    "wordy": lambda folder: refuse("one\ntwo"),
    "traceback": fail,
    "crash": lambda folder: os.kill(os.getpid(), signal.SIGSEGV),
    "memory": lambda folder: bytearray(3 << 30),
    "executed": lambda folder: canary(folder).touch(),
    "hang": lambda folder: time.sleep(60),
}


def outcome_of(end, tmp_path, complaint=""):
    def work(folder):
        run_call(folder, "step", lambda: end(folder))
        return "the change", complaint

    ((key, outcome),) = run_all(iter([("key", work)]), tmp_path, jobs=1)
    assert key == "key"
    return outcome


@pytest.mark.parametrize("kind", ENDS)
def test_ends_are_told_apart(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    outcome = outcome_of(ENDS[kind], tmp_path)
    assert outcome.kind == kind
    assert outcome.failed == (kind not in ("ok", "refused"))
    assert outcome.rss > 1 << 20
    assert not list(tmp_path.iterdir())


def test_a_message_over_300_characters_is_wordy(tmp_path):
    assert outcome_of(lambda folder: refuse("x" * 293), tmp_path).kind == "refused"
    assert outcome_of(lambda folder: refuse("x" * 294), tmp_path).kind == "wordy"


def test_what_a_judge_says_is_wrong_is_wrong(tmp_path):
    outcome = outcome_of(ENDS["ok"], tmp_path, "accepted NaN")
    assert (outcome.kind, outcome.detail) == ("wrong", "accepted NaN")


def test_a_fault_of_the_fuzzing_itself_ends_it(tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(run_all(iter([("key", lambda folder: 1 / 0)]), tmp_path, jobs=1))


def test_children_change_nothing_here(tmp_path):
    before = sys.stdout, os.getcwd()
    outcome_of(ENDS["ok"], tmp_path)
    assert (sys.stdout, os.getcwd()) == before
