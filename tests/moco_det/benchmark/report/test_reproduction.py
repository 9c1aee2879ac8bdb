"""Tables from run folders made by hand, every number worked out beside it; and their page."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from html_page import Page

from moco_det.benchmark.jobs.grid import (
    ClassifierExperiment,
    Experiment,
    Grid,
    Part,
    Row,
    Run,
    Table,
)
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import reproduction, tables
from moco_det.benchmark.report.pages import Sample, sample_pictures
from moco_det.benchmark.report.tables import Cell, ColumnGroup, RunCount
from moco_det.benchmark.significance import Difference, KnownDeviation, Summary

EXPERIMENT = Experiment("voc", "A detector", iterations=100, batch=16, trials=5)
ROWS = {
    "random": Row("random", "random init.", config="random"),
    "supervised": Row("supervised", "super.", config="supervised"),
    "moco": Row("moco", "MoCo"),
    "other": Row("other", "never given"),
}
PART = Part(
    EXPERIMENT,
    {"top-1": None, "AP50": "bbox/AP50", "AP": "bbox/AP"},
    {
        "random": [None, 60.0, 33.0],
        "supervised": [76.5, 81.0, 53.0],
        "moco": [60.6, 81.5, 56.0],
        "other": [1.0, 2.0, 3.0],
    },
    reference="supervised",
)
TABLE = Table("2b", "Table 2 (b)", "MoCo v1", (PART,))
GRID = Grid(ROWS, {"2b": TABLE})


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, "native")


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
    return reproduction.collect(GRID, [TABLE], runs, settings, {})


def cells_of(found, row):
    entry = next(entry for entry in found.tables[0].rows if entry.name == row)
    return dict(zip(PART.columns, entry.cells[0], strict=True))


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
    assert cell.summary.mean == 82.0
    assert cell.summary.sd == pytest.approx(0.7071, abs=1e-4)
    assert cell.summary.n == 2
    assert cell.values == {1: 81.5, 2: 82.5}


def test_a_single_trial_has_no_deviation_and_is_not_marked(found):
    cell = cells_of(found, "random")["AP"]
    assert cell.summary == Summary(34.0, None, 1)
    assert cell.from_published == Difference(1.0, None)
    assert not cell.from_published.significant


def test_differences_from_the_paper(found):
    cell = cells_of(found, "moco")["AP"]
    # 56.5 - 56.0; t of 1 degree 12.706, s = sqrt(0.5), sqrt(1/2 + 1/5)
    assert cell.from_published.value == pytest.approx(0.5)
    assert cell.from_published.margin == pytest.approx(12.706 * (0.5 * 0.7) ** 0.5)
    assert not cell.from_published.significant


def test_gaps_to_the_supervised_row(found):
    # AP: 56.5 - 53.2; variances 0.5 and 0.08, 2 degrees: s^2 = 0.29; t = 4.303; sqrt(1/2 + 1/2)
    gap = cells_of(found, "moco")["AP"].from_reference
    assert gap.value == pytest.approx(3.3)
    assert gap.margin == pytest.approx(4.303 * 0.29**0.5)
    assert gap.significant
    assert not cells_of(found, "moco")["AP50"].from_reference.significant
    assert cells_of(found, "supervised")["AP"].from_reference is None


def test_gaps_take_the_trials_that_both_rows_have(found):
    # random has trial 1 alone: 34 - 53, not 34 - 53.2
    assert cells_of(found, "random")["AP"].from_reference.value == -19.0


def test_what_was_not_run_is_empty(found):
    for row, column in (("other", "AP"), ("moco", "top-1")):
        cell = cells_of(found, row)[column]
        assert (cell.summary, cell.values) == (None, {})
        assert cell.from_published is None and cell.from_reference is None
    assert cells_of(found, "moco")["top-1"].published == 60.6


def test_a_known_deviation_judges_a_single_trial():
    experiment = Experiment(
        "coco", "", 1, 1, trials=1, trial_sd={"bbox/AP": KnownDeviation(0.15, 4)}
    )
    single = reproduction.make_cell({1: 38.0}, 38.9, {}, experiment, "bbox/AP")
    assert single.from_published.margin == pytest.approx(2.776 * 0.15 * 2**0.5)
    assert single.from_published.significant
    unknown = reproduction.make_cell({1: 38.0}, 38.9, {}, experiment, "bbox/AP50")
    assert unknown.from_published.margin is None


def test_missing_runs_are_said(found):
    assert found.tables[0].notes == ["Incomplete: 5 of 6 runs are finished."]


def test_what_a_table_says_of_its_numbers_stands_first(settings):
    table = dataclasses.replace(TABLE, note="The figure is a drawing.")
    notes = reproduction.collect(GRID, [table], planned(), settings, {}).tables[0].notes
    assert notes == ["The figure is a drawing.", "Incomplete: 0 of 6 runs are finished."]


def test_a_classifier_s_runs_fill_a_table_like_a_detector_s(settings):
    """Top-1 of the last epoch, the schedule that was cut short, and what the user has changed."""
    experiment = ClassifierExperiment("linear", "A classifier", "imagenet", epochs=4, trials=1)
    part = Part(experiment, {"top-1": "classification/top1"}, {"moco": [60.6], "other": [None]})
    table = Table("1", "Table 1", "MoCo v1", (part,))
    grid, checkpoints = Grid(ROWS, {"1": table}), {"moco": Path("c.pth.tar")}
    runs = grid.runs([table], {}, None, Path("c"), checkpoints=checkpoints, flags={"epochs": "2"})
    folder = settings.folder(runs[0])
    folder.write_record({"state": "finished", "attempts": [{}], "seconds": 1.0})
    lines = [
        {"step": 5, "epoch": 1, "loss": 2.0},
        {"step": 5, "epoch": 1, "val_acc1": 62.0, "val_acc5": 80.0},
        {"step": 10, "epoch": 2, "val_acc1": 61.5, "val_acc5": 80.0},
    ]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made,) = reproduction.collect(grid, [table], runs, settings, {}).tables
    assert made.notes == [
        "Shortened schedule: linear ran 2 epochs, 50 % of the paper's 4.",
        "Settings other than the config's: epochs 2.",
    ]
    ours, silent = (row.cells[0][0] for row in made.rows)
    assert ours.values == {1: 61.5} and ours.from_published.value == pytest.approx(0.9)
    assert silent.published is None and silent.summary is None
    assert reproduction.loss_curves(runs, settings) == {"linear": {"moco": [[(5, 2.0)]]}}
    assert sample_pictures(runs, settings) == {}  # a classifier has none


def test_an_rmse_is_printed_in_metres_to_three_decimals(settings):
    """Smaller is better: the heading says so, and a difference is the plain one."""
    experiment = Experiment("depth", "Depth", 100, 16, trials=1)
    columns = {"rmse (m) ↓": "depth/rmse"}
    part = Part(experiment, columns, {"moco": [0.606], "other": [0.58]}, reference="other")
    table = Table("9", "Table 9", "a paper", (part,))
    grid = Grid({name: Row(name, name) for name in ("moco", "other")}, {"9": table})
    weights = {name: Path(f"{name}.pkl") for name in ("moco", "other")}
    runs = grid.runs([table], weights, [1, 2], Path("c"))
    for run in runs:
        folder = settings.folder(run)
        folder.write_record({"state": "finished"})
        value = (0.591 if run.row == "moco" else 0.582) + 0.002 * run.trial
        line = {"iteration": 99, "depth/rmse": value}
        (folder.path / "metrics.json").write_text(json.dumps(line) + "\n")
        solver = {"SOLVER": {"MAX_ITER": 100, "IMS_PER_BATCH": 16}}
        (folder.path / "config.yaml").write_text(json.dumps(solver))
    found = reproduction.collect(grid, [table], runs, settings, {})
    text = reproduction.markdown(found)
    assert "↓: smaller is better" in text and "rmse (m) ↓" in text
    assert "| ours (n = 2) | 0.594 ± 0.001 |" in text
    assert "| paper        | 0.606         |" in text
    assert "−0.012" in text and "+0.009" in text  # to the paper; the gap to the other row
    page = str(reproduction.render_page(found, {}, {}))
    assert "paper 0.606" in page and "0.594" in page and "to paper −0.012" in page
    cell = reproduction.as_json(found)["tables"][0]["rows"][0]["cells"][0][0]
    assert cell["mean"] == pytest.approx(0.594) and cell["published"] == 0.606


def test_a_failed_run_is_said(settings):
    runs = planned([1])
    for run in runs:
        settings.folder(run).write_record({"state": "failed"})
    notes = collected(settings, runs).tables[0].notes
    assert notes == ["Incomplete: 0 of 3 runs are finished, 3 failed."]


def test_a_shortened_schedule_is_noted(settings):
    runs = planned([1], ("SOLVER.MAX_ITER", "10"))
    for run in runs:
        finish(run, settings, 1.0, 1.0, iterations=10)
    short, changed = collected(settings, runs).tables[0].notes
    assert short == (
        "Shortened schedule: voc ran 10 iterations of 16 images, 10 % of the paper's 100 of 16."
    )
    assert changed == "Settings other than the config's: SOLVER.MAX_ITER 10."


def test_smaller_steps_for_longer_are_no_shorter_schedule(settings):
    runs = planned([1])
    for run in runs:
        finish(run, settings, 1.0, 1.0, iterations=800, batch=2)
    assert collected(settings, runs).tables[0].notes == []


def test_markdown_is_laid_out_by_rows(found):
    table = tables.markdown_table(found.tables[0])
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
    lines = list(csv.DictReader(io.StringIO(tables.tables_csv(found.tables))))
    assert len(lines) == 4 * 3
    cell = next(line for line in lines if line["row"] == "moco" and line["column"] == "AP")
    assert float(cell["sd"]) == pytest.approx(0.5**0.5, abs=1e-12)
    assert cell["minus_reference_marked"] == "True"
    assert cell["notes"] == "Incomplete: 5 of 6 runs are finished."
    empty = next(line for line in lines if line["row"] == "other" and line["column"] == "AP")
    assert (empty["mean"], empty["n"], empty["published"]) == ("", "0", "3.0")


def test_report_json_has_the_keys_of_the_first_version(found):
    content = json.loads(json.dumps(reproduction.as_json(found), allow_nan=False))
    assert list(content) == ["title", "created", "checkpoints", "environment", "tables", "runs"]
    run = next(run for run in content["runs"] if run["row"] == "moco")
    assert run == {
        "name": "voc/moco/trial1", "experiment": "voc", "row": "moco", "trial": 1,
        "state": "finished", "results": {"bbox/AP50": 81.5, "bbox/AP": 56.0},
        "record": {"state": "finished", "attempts": [{}], "seconds": 1.0}, "shortened": None,
    }  # fmt: skip


# -- the page -------------------------------------------------------------------------------------


@pytest.fixture
def report():
    """A table of two groups of columns, of which "super." has all there can be."""
    groups = [ColumnGroup("voc", heading, ["AP"], "super", 5) for heading in ("DC5", "C4")]
    whole = Cell({1: 56.15, 2: 56.35}, 54.0, Difference(2.25, 1.0), Difference(-0.31, 1.0))
    single = Cell({1: 40.0})
    table = tables.Table(
        name="3",
        title="Table <3>",
        source="a paper",
        notes=["Shortened schedule: 10 & 20."],
        groups=groups,
        rows=[
            tables.Row("super", "super.", [RunCount(2)] * 2, [[whole], [Cell()]]),
            tables.Row(
                "mine", "<mine>", [RunCount(1), RunCount(0)], [[single], [Cell(published=12.5)]]
            ),
        ],
    )
    record = {
        "command": "python x '<y>'",
        "engine": "native",
        "attempts": [{}],
        "seconds": 3725.0,
        "code": {"commit": "abc"},
        "packages": {"torch": "2"},
        "hardware": {"processor": "a CPU"},
    }
    runs = [Run(EXPERIMENT, row, 1, Path("c.yaml"), ()) for row in ("super", "mine")]
    return reproduction.Report(
        title="A title",
        created="today",
        checkpoints={"mine": "/a/b.pth"},
        environment={},
        tables=[table],
        outcomes=[
            reproduction.Outcome(runs[0], "finished", record, {}),
            reproduction.Outcome(runs[1], "to do", {}, {}),
        ],
    )


def render(report):
    curves = {"voc": {"super": [[(20, 2.0), (40, 1.0)]], "mine": [[]]}}
    pictures = {"voc": [[Sample("7", None, "data:,a"), Sample("7", "super", "data:,b")]], "x": []}
    return reproduction.render_page(report, curves, pictures)


def test_page_is_well_formed_and_fetches_nothing(report):
    text = render(report)
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.tags and "url(" not in text
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.ids)
    assert 'name="viewport"' in text


def shown_cells(report):
    """The texts of each cell, joined by |, without the two lines of headings."""
    rows = re.findall(r"<tr>(.*?)</tr>", table_in(render(report)))
    return [
        [re.sub(r"(<[^>]+>)+", "|", c).strip("|") for c in re.findall(r"<td>.*?</td>", row)]
        for row in rows[2:]
    ]


def table_in(page):
    return re.search(r'<table class="paper">.*?</table>', page, re.DOTALL)[0]


def test_cells_hold_ours_the_papers_and_both_differences(report):
    first, second = shown_cells(report)
    assert first == ["56.2| ± 0.1|paper 54.0|to paper +2.2*|gap −0.3", ""]
    assert second == ["40.0", "paper 12.5"]  # one run: no deviation; none: the paper's alone


def test_only_what_exceeds_chance_is_marked(report):
    text = table_in(render(report))
    assert re.findall(r'class="sub marked">([^<]*)<', text) == ["to paper +2.2*"]


def test_headings_number_of_runs_and_notes(report):
    text = render(report)
    page = Page(text)
    assert "DC5 C4 pre-train AP AP" in page.text
    assert "super. n = 2" in page.text and "<mine> n = 1 / 0" in page.text
    assert '<p class="stamp">Shortened schedule: 10 &amp; 20.</p>' in text
    assert "paper: a paper; gap: to super." in page.text


def test_runs_say_what_they_were(report):
    words = Page(render(report)).text
    assert "1 of 2 runs are finished" in words
    assert "voc/super/trial1 finished native 1 h 02 min" in words
    assert "python x '<y>'" in words and "commit abc" in words


def test_pictures_name_their_row(report):
    text = render(report)
    assert '<img src="data:,a" alt="Image 7, truth">' in text
    assert '<img src="data:,b" alt="Image 7, super.">' in text
    assert "<h3>x</h3>" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", bytes(40)), ("run.json", b""), ("metrics.json", bytes(40)),
        ("metrics.json", b'{"iteration": 3, "bbox/AP": "x"}\n'), ("config.yaml", b"SOLVER: [1"),
        ("config.yaml", b""),
    ],
)  # fmt: skip
def test_one_damaged_folder_is_said_and_the_others_are_reported(settings, name, content):
    runs = planned()
    for run in runs:
        finish(run, settings, 80.0 + run.trial, 50.0)
    damaged = next(run for run in runs if run.row == "moco")
    (settings.folder(damaged).path / name).write_bytes(content)
    found = collected(settings, runs)
    outcome = next(o for o in found.outcomes if o.run == damaged)
    assert outcome.state == "unreadable" and name in outcome.problem
    assert cells_of(found, "moco")["AP50"].values == {2: 82.0}
    assert cells_of(found, "supervised")["AP50"].values == {1: 81.0, 2: 82.0}
    assert any(note.startswith(f"Unreadable: {damaged.name}: ") for note in found.tables[0].notes)
    curves = reproduction.loss_curves(runs, settings)
    assert sorted(map(len, curves["voc"]["moco"])) == [0, 2]
    page = reproduction.write_report(found, settings.output, curves, {})
    assert f"unreadable: {outcome.problem[:20]}" in page.read_text()
    assert damaged.name in (settings.output / "report.md").read_text()
    content = json.loads((settings.output / "report.json").read_text())
    assert [run.get("problem", "") for run in content["runs"]].count("") == len(runs) - 1
