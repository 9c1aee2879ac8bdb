"""Trials whose commands are a line of Python each: done once, continued, reported, tabulated."""

import csv
import io
import json
import signal
import subprocess
import sys
import time

import pytest

from moco_det.benchmark.steps import Step
from moco_det.benchmark.trial_table import as_csv, collect, markdown, write_table
from moco_det.benchmark.trials import Trial, run_trials
from moco_det.errors import UserError


def trial(folder, row, seed, code, settings=None) -> Trial:
    """Its command runs `code` in a process, with `folder` at hand; its measure is in value.json."""
    folder = folder / f"{row}{seed}"
    head = f"import pathlib, sys, time; folder = pathlib.Path({str(folder)!r})\n"
    step = Step("write", "write", [sys.executable, "-S", "-c", head + code], 1.0)

    def read():
        return {"top-1": json.loads((folder / "value.json").read_text())}

    return Trial(row, seed, folder, settings or {"seed": seed}, [step], read)


def value(number: float) -> str:
    """A command that counts its runs in the file `runs` and leaves `number` to be read."""
    return (
        f"(folder / 'runs').open('a').write('x')\n(folder / 'value.json').write_text('{number}')\n"
    )


def test_a_finished_trial_is_not_run_again(tmp_path, capfd):
    trials = [trial(tmp_path, "a", 0, value(50)), trial(tmp_path, "a", 1, value(54))]
    assert [t.state() for t in trials] == ["to do", "to do"]
    assert run_trials(trials) == {}
    assert [t.state() for t in trials] == ["done", "done"]
    first = [t.result() for t in trials]
    assert run_trials(trials) == {}
    assert [t.result() for t in trials] == first
    assert (tmp_path / "a0/runs").read_text() == "x"
    assert "2 of 2 trials are done" in capfd.readouterr().out


def test_a_failed_trial_is_reported_and_the_others_go_on(tmp_path, capfd):
    failing = "import os\nsys.exit(0 if os.path.exists(folder / 'mended') else 'error: no luck')\n"
    trials = [
        trial(tmp_path, "a", 0, failing + value(1)),
        trial(tmp_path, "b", 0, value(2)),
    ]
    failures = run_trials(trials)
    assert list(failures) == ["a, seed 0"]
    assert failures["a, seed 0"].startswith("error: no luck (step 'write' failed with exit code 1")
    assert "== failed: a, seed 0" in capfd.readouterr().out
    assert [t.state() for t in trials] == ["begun", "done"]
    rows = collect(trials, failures)
    assert [(row["failed"], row["missing"], len(row["trials"])) for row in rows] == [
        (1, 0, 0),
        (0, 0, 1),
    ]
    assert "| a        | 0, 1 failed |         |" in markdown(rows)
    (tmp_path / "a0/value.json").write_text("3")
    (tmp_path / "a0/mended").touch()
    assert run_trials(trials) == {}  # begun again, and no longer failing
    assert trials[0].result()["measures"] == {"top-1": 3}


def test_a_folder_of_other_settings_is_refused(tmp_path):
    run_trials([trial(tmp_path, "a", 0, value(1), {"lr": 0.1})])
    again = trial(tmp_path, "a", 0, value(1), {"lr": 0.2})
    with pytest.raises(UserError, match="a0 holds a trial with other settings.*another --output"):
        run_trials([again])


TWO_TRIALS = """
import signal, sys
from pathlib import Path
from test_trials import trial, value
from moco_det.benchmark.trials import run_trials

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
folder = Path(sys.argv[1])
wait = "(folder / 'begun').touch()\\ntime.sleep(0 if (folder / 'go').exists() else 600)\\n"
run_trials([trial(folder, "a", 0, value(1)), trial(folder, "a", 1, wait + value(2))])
"""


def test_a_killed_chain_goes_on(tmp_path):
    """The process is stopped within its second trial; the first is then not run again."""
    command = [sys.executable, "-c", TWO_TRIALS, str(tmp_path)]
    here = {"PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(command, env=here, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "a1/begun").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert not (tmp_path / "a1/result.json").exists()
    (tmp_path / "a1/go").touch()
    subprocess.run(command, env=here, stdout=subprocess.DEVNULL, check=True, timeout=600)
    assert (tmp_path / "a0/runs").read_text() == "x"
    assert json.loads((tmp_path / "a1/result.json").read_text())["measures"] == {"top-1": 2}


def test_the_table_by_hand(tmp_path):
    trials = [
        *(trial(tmp_path, "with", seed, value(v)) for seed, v in enumerate((50, 54, 55))),
        trial(tmp_path, "without", 0, value(40.25)),
        trial(tmp_path, "without", 1, value(0)),
    ]
    run_trials(trials[:-1])
    rows = collect(trials, {})
    text = write_table(rows, "a title", {"settings": {"lr": 1}}, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]] == [
        ["with", "3", "53.0 ± 2.6"],
        ["without", "1, 1 missing", "40.2"],
    ]
    first, second = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (tmp_path / "table.csv").read_text() == as_csv(rows)
    assert float(first["top-1 mean"]) == 53
    assert float(first["top-1 sd"]) == pytest.approx(7**0.5)
    assert (second["n"], second["missing"], second["top-1 mean"], second["top-1 sd"]) == (
        "1", "1", "40.25", "",
    )  # fmt: skip
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["settings"] == {"lr": 1}
    assert [t["measures"]["top-1"] for t in kept["rows"][0]["trials"]] == [50, 54, 55]
    assert kept["rows"][1]["spread"]["top-1"] == {"mean": 40.25, "deviation": None, "n": 1}
