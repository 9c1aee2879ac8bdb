"""Tables as they are printed, and those of trials without a paper: every number by hand."""

import csv
import io
import json
from dataclasses import dataclass

import pytest

from moco_det.benchmark.report import tables
from moco_det.benchmark.report.tables import Cell, ColumnGroup, Row, RunCount, Table
from moco_det.benchmark.significance import Difference
from moco_det.common.errors import UserError


def split(markdown):
    """The texts of each line's cells."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines()]


@pytest.fixture
def table():
    """Two groups of columns; one row with all there can be, one of which a part was run."""
    groups = [
        ColumnGroup(experiment, heading, ["AP"], reference="super", trials=5)
        for heading, experiment in (("DC5", "one"), ("C4", "two"))
    ]
    whole = Cell({1: 56.15, 2: 56.35}, 54.0, Difference(2.25, 1.0), Difference(-0.31, 1.0))
    rows = [
        Row("super", "super.", [RunCount(2), RunCount(2)], [[whole], [Cell()]]),
        Row("mine", "mine", [RunCount(1), RunCount(0, 1)], [[Cell({1: 40.0})], [Cell({}, 12.5)]]),
        Row("none", "none", [RunCount(0), RunCount(0)], [[Cell()], [Cell()]]),
    ]
    notes = ["one note.", "another."]
    return Table("a title", groups, rows, name="3", source="a paper", notes=notes)


def test_summaries_are_of_the_values():
    assert Cell().summary is None
    assert Cell({4: 7.0}).summary == tables.Summary(7.0, None, 1)
    assert Cell({1: 50.0, 2: 54.0, 3: 55.0}).summary.sd == pytest.approx(7**0.5)


def test_counts_in_words():
    counts = RunCount(3), RunCount(2, failed=1), RunCount(0, 2, 4)
    assert [count.text() for count in counts] == ["3", "2, 1 failed", "0, 2 failed, 4 missing"]
    assert [count.wanted for count in counts] == [3, 3, 6]


def test_markdown_has_a_line_for_all_that_a_row_has(table):
    assert split(tables.markdown_table(table))[2:] == [
        ["super.", "ours (n = 2)", "56.2 ± 0.1", ""],
        ["", "paper", "54.0", ""],
        ["", "ours − paper", "+2.2*", ""],
        ["", "gap to super.", "−0.3", ""],
        ["mine", "ours (n = 1 / 0)", "40.0", ""],
        ["", "paper", "", "12.5"],
        ["none", "", "", ""],
    ]
    assert split(tables.markdown_table(table))[0] == ["pre-train", "", "DC5 AP", "C4 AP"]


def test_json_has_the_keys_of_the_first_version(table):
    content = json.loads(json.dumps(tables.table_json(table)))
    assert list(content) == ["name", "title", "source", "stamps", "parts", "rows"]
    assert content["stamps"] == ["one note.", "another."]
    assert content["parts"][1] == {
        "experiment": "two", "heading": "C4", "columns": ["AP"], "reference": "super", "trials": 5,
    }  # fmt: skip
    row = content["rows"][1]
    assert row["runs"] == [{"finished": 1, "wanted": 1}, {"finished": 0, "wanted": 1}]
    assert row["cells"][1] == [
        {
            "published": 12.5, "mean": None, "sd": None, "n": 0, "values": {},
            "from_published": None, "from_reference": None,
        }
    ]  # fmt: skip
    whole = content["rows"][0]["cells"][0][0]
    assert (whole["mean"], whole["n"], whole["values"]) == (56.25, 2, {"1": 56.15, "2": 56.35})
    assert whole["from_published"] == {"value": 2.25, "spread": 1.0, "marked": True}


def test_csv_columns_of_a_cell(table):
    lines = list(csv.DictReader(io.StringIO(tables.tables_csv([table]))))
    assert len(lines) == 3 * 2
    assert tuple(lines[0]) == tables.CSV_COLUMNS
    assert lines[0] == {
        "table": "3", "experiment": "one", "row": "super", "column": "AP", "published": "54.0",
        "published_trials": "5", "mean": "56.25", "sd": lines[0]["sd"], "n": "2",
        "minus_published": "2.25", "minus_published_spread": "1.0",
        "minus_published_marked": "True",
        "reference": "super", "minus_reference": "-0.31", "minus_reference_spread": "1.0",
        "minus_reference_marked": "False", "notes": "one note. another.",
    }  # fmt: skip


# -- runs side by side ----------------------------------------------------------------------------


def finished_run(folder, ap50):
    """An OUTPUT_DIR whose last evaluation counts, as metrics.json holds it."""
    folder.mkdir()
    lines = [
        {"iteration": 4, "bbox/AP": 1.0, "bbox/AP50": 2.0, "bbox/AP75": 0.5},
        {"iteration": 9, "bbox/AP": ap50 / 2, "bbox/AP50": ap50, "bbox/AP75": 7.0},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def comparison(runs):
    return tables.means_table(tables.compare_runs(runs))


def test_rows_hold_means_and_deviations(tmp_path):
    runs = {
        "moco": [finished_run(tmp_path / "a", 50.0), finished_run(tmp_path / "b", 54.0)],
        "random": [finished_run(tmp_path / "c", 40.0)],
    }
    _, _, moco, random = split(comparison(runs))
    # By hand: mean of 50 and 54 is 52; deviation sqrt((4 + 4) / 1) = 2.83.
    assert moco == ["moco", "2", "52.0 ± 2.8", "26.0 ± 1.4", "7.0 ± 0.0"]
    assert random == ["random", "1", "40.0", "20.0", "7.0"]


def test_every_task_has_its_columns(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    line = {"iteration": 9, "bbox/AP": 1.0, "segm/AP": 2.0, "sem_seg/mIoU": 3.0, "bbox/AP-cat": 4.0}
    (folder / "metrics.json").write_text(json.dumps(line) + "\n")
    head, _, row = split(comparison({"x": [folder], "y": [finished_run(tmp_path / "b", 50.0)]}))[:3]
    assert head == ["start", "trials", "AP50", "AP", "AP75", "mask AP", "mIoU"]
    assert row[2:] == ["", "1.0", "", "2.0", "3.0"]


def test_an_rmse_has_three_decimals(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 9, "depth/rmse": 0.6064}\n')
    head, _, row = split(comparison({"x": [tmp_path]}))
    assert (head[2:], row[2:]) == (["depth rmse"], ["0.606"])


def test_a_run_that_was_not_evaluated_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "lr": 0.1, "total_loss": 2.5}\n')
    with pytest.raises(UserError, match="holds no evaluation"):
        comparison({"moco": [tmp_path]})


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no metrics.json"):
        comparison({"moco": [tmp_path]})


# -- ablations ------------------------------------------------------------------------------------


@dataclass
class Trial:
    """As `jobs` has it, with its result at hand."""

    row: str
    seed: int
    measures: dict | None

    @property
    def name(self):
        return f"{self.row}, seed {self.seed}"

    def result(self):
        return self.measures and {"measures": self.measures, "seconds": 1.5}


def test_the_ablation_by_hand(tmp_path):
    trials = [
        *(Trial("with", seed, {"top-1": v}) for seed, v in enumerate((50, 54, 55))),
        Trial("without", 0, {"top-1": 40.25}),
        Trial("without", 1, None),
        Trial("never", 0, None),
    ]
    failures = {"never, seed 0": "out of luck"}
    text = tables.write_ablation(trials, failures, "a title", {"settings": {"lr": 1}}, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert text.startswith("a title\n\n| varied ")
    assert split(text)[4:] == [
        ["with", "3", "53.0 ± 2.6"],
        ["without", "1, 1 missing", "40.2"],
        ["never", "0, 1 failed", ""],
    ]
    first, second, third = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert float(first["top-1 mean"]) == 53
    assert float(first["top-1 sd"]) == pytest.approx(7**0.5)
    assert (second["n"], second["missing"], second["top-1 mean"], second["top-1 sd"]) == (
        "1", "1", "40.25", "",
    )  # fmt: skip
    assert (third["n"], third["failed"], third["missing"]) == ("0", "1", "0")
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["settings"] == {"lr": 1}
    assert [t["measures"]["top-1"] for t in kept["rows"][0]["trials"]] == [50, 54, 55]
    assert kept["rows"][0]["trials"][2] == {"seed": 2, "measures": {"top-1": 55}, "seconds": 1.5}
    assert kept["rows"][1]["spread"]["top-1"] == {"mean": 40.25, "deviation": None, "n": 1}
    assert kept["rows"][2] == {
        "row": "never",
        "trials": [],
        "failed": 1,
        "missing": 0,
        "spread": {},
    }


def test_columns_are_all_rows_measures_in_the_order_of_the_longest():
    trials = [
        Trial("short", 0, {"b": 1.0, "z": 2.0}),
        Trial("long", 0, {"a": 3.0, "b": 4.0, "c": 5.0}),
    ]
    head, _, short, long = split(tables.means_table(tables.ablation_table(trials, {})))
    assert head == ["varied", "n", "a", "b", "c", "z"]
    assert short == ["short", "1", "", "1.0", "", "2.0"]
    assert long == ["long", "1", "3.0", "4.0", "5.0", ""]
