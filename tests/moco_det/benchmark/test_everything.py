"""All benchmarks in turn: what is run, what is read from it, and what is written."""

import json
from pathlib import Path

import pytest
from readme_commands import parse

from moco_det.benchmark import everything
from moco_det.benchmark.everything import Measured, commands, measure_all, tables_in, write_measured

TABLE = ["machine: x", "| step | ms |", "|:---|---:|", "| ours | 1.5 |", "| theirs | 3 |", "ms: of"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_command_is_one(device, tmp_path, repository):
    found = commands(device, tmp_path, "native")
    for arguments in found:
        parse(Path("tools/benchmark.py"), arguments)  # SystemExit where it is none
    names = [arguments[0] for arguments in found]
    assert names[0] == "pretrain-step"
    assert names.count("detector-step") == (4 if device == "cuda" else 1)
    assert {"data-path", "knn-bank", "annotation-memory"} < set(names)


def test_tables_are_read_from_what_is_printed():
    rows = [{"step": "ours", "ms": "1.5"}, {"step": "theirs", "ms": "3"}]
    assert tables_in([*TABLE, *TABLE]) == [rows, rows]
    assert tables_in(["no table"]) == []


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Stands in for tools/benchmark.py."""
    path = tmp_path / "stand_in.py"
    path.write_text(
        "import sys, time\n"
        f"lines = {TABLE!r}\n"
        "if sys.argv[1] == 'fails': sys.exit('error: no such GPU')\n"
        "print(*lines, sep=chr(10), flush=True)\n"
        "if sys.argv[1] == 'hangs': time.sleep(600)\n"
    )
    monkeypatch.setattr(everything, "own_file", lambda name: path)
    return path


def test_what_fails_or_takes_too_long_does_not_end_the_rest(script, tmp_path):
    measured = measure_all([["fails"], ["works", ""], ["hangs"], ["never"]], minutes=0.1)
    assert [found.problem for found in measured] == [
        "error: no such GPU", "", "not finished: the time is over", "not run: the time is over",
    ]  # fmt: skip
    assert measured[1].tables == measured[2].tables == tables_in(TABLE)
    assert measured[1].lines == TABLE
    page = write_measured(measured, "a machine", tmp_path).read_text()
    assert '## `benchmark.py works ""`\n\n    machine: x\n\n| step | ms |\n' in page
    assert "| theirs | 3 |\n\n    ms: of\n" in page
    assert page.count("**not ") == 2
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["machine"] == "a machine"
    assert written["code"]["commit"]
    assert written["packages"]["torch"]
    assert [Measured(**found) for found in written["measured"]] == measured


def test_photographs_are_drawn_in_their_size(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(everything, "PHOTOGRAPHS", 2)
    everything.draw_photographs(tmp_path)
    shapes = [cv2.imread(str(path)).shape for path in sorted(tmp_path.iterdir())]
    assert shapes == [(375, 500, 3)] * 2
