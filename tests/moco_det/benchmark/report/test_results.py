"""Tables from run folders made by hand: every number worked out beside it."""

import csv
import io
import json
from pathlib import Path

import pytest

from moco_det.benchmark.jobs.grid import Experiment, Grid, Part, Row, Table
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import results, tables
from moco_det.benchmark.significance import KnownDeviation

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)
ROWS = {
    "random": Row("random", "random init.", config="random"),
    "supervised": Row("supervised", "super.", config="supervised"),
    "moco": Row("moco", "MoCo"),
    "other": Row("other", "never given"),
}
PART = Part(
    EXPERIMENT,
    "",
    {"top-1": None, "AP50": "bbox/AP50", "AP": "bbox/AP"},
    {
        "random": [None, 60.0, 33.0],
        "supervised": [76.5, 81.0, 53.0],
        "moco": [60.6, 81.5, 56.0],
        "other": [1.0, 2.0, 3.0],
    },
    "supervised",
)
TABLE = Table("2b", "Table 2 (b)", "MoCo v1", (PART,))
GRID = Grid(ROWS, {"2b": TABLE})


@pytest.fixture
def settings(tmp_path):
    return Settings(Path("repository"), tmp_path, "native")


def planned(trials=(1, 2), options=()):
    weights = {"moco": Path("m.pkl")}
    return GRID.runs([TABLE], weights, trials, Path("configs"), options)


def finish(run, settings, ap50, ap, iterations=100, batch=16):
    folder = settings.folder(run)
    folder.write_record({"state": "finished", "attempts": [{}], "seconds": 1.0})
    lines = [
        {"iteration": 19, "lr": 0.1, "total_loss": 2.0},
        {"iteration": 49, "bbox/AP50": 1.0, "bbox/AP": 1.0},  # an evaluation on the way
        {"iteration": 99, "lr": 0.1, "total_loss": 1.0},
        {"iteration": 100, "bbox/AP50": ap50, "bbox/AP": ap, "bbox/AP-cat": None},
    ]
    (folder.path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder.path / "config.yaml").write_text(
        f"SOLVER: {{MAX_ITER: {iterations}, IMS_PER_BATCH: {batch}}}\n"
    )


def collected(settings, runs):
    return results.collect(GRID, [TABLE], runs, settings, [])


def cells_of(found, row):
    entry = next(entry for entry in found["tables"][0]["rows"] if entry["row"] == row)
    return dict(zip(PART.columns, entry["cells"][0], strict=True))


@pytest.fixture
def found(settings):
    """Two trials of the supervised row, two of MoCo's, one of random's; nothing of the other."""
    runs = planned()
    numbers = {
        ("supervised", 1): (81.0, 53.0),
        ("supervised", 2): (81.4, 53.4),
        ("moco", 1): (81.5, 56.0),
        ("moco", 2): (82.5, 57.0),
        ("random", 1): (60.5, 34.0),
    }
    for run in runs:
        if (run.row, run.trial) in numbers:
            finish(run, settings, *numbers[run.row, run.trial])
    return collected(settings, runs)


def test_means_and_deviations(found):
    cell = cells_of(found, "moco")["AP50"]
    # (81.5 + 82.5) / 2; deviations -0.5 and 0.5: sqrt(0.5 / 1)
    assert cell["mean"] == 82.0
    assert cell["sd"] == pytest.approx(0.7071, abs=1e-4)
    assert cell["n"] == 2
    assert cell["values"] == {1: 81.5, 2: 82.5}


def test_a_single_trial_has_no_deviation_and_no_mark(found):
    cell = cells_of(found, "random")["AP"]
    assert (cell["mean"], cell["sd"], cell["n"]) == (34.0, None, 1)
    assert cell["from_published"] == {"value": 1.0, "spread": None, "marked": False}


def test_differences_from_the_paper(found):
    cell = cells_of(found, "moco")["AP"]
    # 56.5 - 56.0; t of 1 degree 12.706, s = sqrt(0.5), sqrt(1/2 + 1/5)
    assert cell["from_published"]["value"] == pytest.approx(0.5)
    assert cell["from_published"]["spread"] == pytest.approx(12.706 * (0.5 * 0.7) ** 0.5)
    assert not cell["from_published"]["marked"]


def test_gaps_to_the_supervised_row(found):
    # AP: 56.5 - 53.2; variances 0.5 and 0.08, 2 degrees: s^2 = 0.29; t = 4.303; sqrt(1/2 + 1/2)
    gap = cells_of(found, "moco")["AP"]["from_reference"]
    assert gap["value"] == pytest.approx(3.3)
    assert gap["spread"] == pytest.approx(4.303 * 0.29**0.5)
    assert gap["marked"]
    assert not cells_of(found, "moco")["AP50"]["from_reference"]["marked"]
    assert cells_of(found, "supervised")["AP"]["from_reference"] is None


def test_gaps_take_the_trials_that_both_rows_have(found):
    # random has trial 1 alone: 34 - 53, not 34 - 53.2
    assert cells_of(found, "random")["AP"]["from_reference"]["value"] == -19.0


def test_what_was_not_run_is_empty(found):
    for row, column in (("other", "AP"), ("moco", "top-1")):
        cell = cells_of(found, row)[column]
        assert (cell["mean"], cell["sd"], cell["n"], cell["values"]) == (None, None, 0, {})
        assert cell["from_published"] is None and cell["from_reference"] is None
    assert cells_of(found, "moco")["top-1"]["published"] == 60.6


def test_a_known_deviation_judges_a_single_trial():
    experiment = Experiment(
        "coco", "", 1, 1, trials=1, trial_sd={"bbox/AP": KnownDeviation(0.15, 4)}
    )
    single = results.cell({1: 38.0}, 38.9, {}, experiment, "bbox/AP")
    assert single["from_published"]["spread"] == pytest.approx(2.776 * 0.15 * 2**0.5)
    assert single["from_published"]["marked"]
    unknown = results.cell({1: 38.0}, 38.9, {}, experiment, "bbox/AP50")
    assert unknown["from_published"]["spread"] is None


def test_missing_runs_are_said(found):
    assert found["tables"][0]["stamps"] == ["Incomplete: 5 of 6 runs are finished."]


def test_a_failed_run_is_said(settings):
    runs = planned([1])
    for run in runs:
        settings.folder(run).write_record({"state": "failed"})
    stamps = collected(settings, runs)["tables"][0]["stamps"]
    assert stamps == ["Incomplete: 0 of 3 runs are finished, 3 failed."]


def test_a_shortened_schedule_is_stamped(settings):
    runs = planned([1], ("SOLVER.MAX_ITER", "10"))
    for run in runs:
        finish(run, settings, 1.0, 1.0, iterations=10)
    short, changed = collected(settings, runs)["tables"][0]["stamps"]
    assert short == (
        "Shortened schedule: voc ran 10 iterations of 16 images, 10 % of the paper's 100 of 16."
    )
    assert changed == "Settings other than the config's: SOLVER.MAX_ITER 10."


def test_smaller_steps_for_longer_are_no_shorter_schedule(settings):
    runs = planned([1])
    for run in runs:
        finish(run, settings, 1.0, 1.0, iterations=800, batch=2)
    assert collected(settings, runs)["tables"][0]["stamps"] == []


def test_markdown_is_laid_out_by_rows(found):
    table = tables.markdown_table(found["tables"][0])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["pre-train", "", "top-1", "AP50", "AP"]
    assert lines[2:5] == [
        ["random init.", "ours (n = 1)", "", "60.5", "34.0"],
        ["", "paper", "", "60.0", "33.0"],
        ["", "ours − paper", "", "+0.5", "+1.0"],
    ]
    moco = next(i for i, line in enumerate(lines) if line[0] == "MoCo")
    assert lines[moco : moco + 4] == [
        ["MoCo", "ours (n = 2)", "", "82.0 ± 0.7", "56.5 ± 0.7"],
        ["", "paper", "60.6", "81.5", "56.0"],
        ["", "ours − paper", "", "+0.5", "+0.5"],
        ["", "gap to super.", "", "+0.8", "+3.3*"],
    ]
    assert lines[-1] == ["never given", "paper", "1.0", "2.0", "3.0"]


def test_csv_has_every_cell_at_full_precision(found):
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(lines) == 4 * 3
    cell = next(line for line in lines if line["row"] == "moco" and line["column"] == "AP")
    assert float(cell["sd"]) == pytest.approx(0.5**0.5, abs=1e-12)
    assert cell["minus_reference_marked"] == "True"
    assert cell["notes"] == "Incomplete: 5 of 6 runs are finished."
    empty = next(line for line in lines if line["row"] == "other" and line["column"] == "AP")
    assert (empty["mean"], empty["n"], empty["published"]) == ("", "0", "3.0")
