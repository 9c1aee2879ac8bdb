"""Tables of trials beside the numbers of a paper, and how they are printed.

All numbers are in percent, but where a column says otherwise. They stay numbers until the functions
here, or the templates of a page, print them. Python's names are those of the field; the keys of
report.json and table.json and the columns of the CSV files are those that the first version wrote,
so that its files stay comparable.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_det.benchmark.jobs.runs import read_results
from moco_det.benchmark.significance import Difference, Summary, signed
from moco_det.common.errors import UserError
from moco_det.common.files import write_json, write_text

SIGNIFICANT = "*"
LEGEND = (
    "In percent, unless a column says otherwise; ↓: smaller is better. Ours: mean ± sample "
    "standard deviation of n runs; one run has no deviation, and an empty cell has not been run. "
    "A gap to another row is taken over the trials that both have. "
    f"{SIGNIFICANT} marks a difference that chance does not explain: beyond the two-sided 95 % "
    "interval of Student's t for two means of one deviation, which is pooled from the runs at hand "
    "and, for AP on COCO, from what is known of single runs (0.15)."
)


@dataclass(frozen=True)
class Cell:
    """One row's number under one column: ours, the paper's, and what lies between.

    Args:
        values: trial -> number, of our finished runs.
        published: the paper's mean.
        from_published: our mean minus the paper's.
        from_reference: our mean minus that of the reference row, over the trials that both have.
        decimals: what is printed of them.
    """

    values: Mapping[int, float] = field(default_factory=dict)
    published: float | None = None
    from_published: Difference | None = None
    from_reference: Difference | None = None
    decimals: int = 1

    @property
    def summary(self) -> Summary | None:
        """None where nothing has been run."""
        return Summary.of(list(self.values.values())) if self.values else None


@dataclass(frozen=True)
class RunCount:
    """What became of a row's runs."""

    finished: int
    failed: int = 0
    missing: int = 0

    @property
    def wanted(self) -> int:
        return self.finished + self.failed + self.missing

    def text(self) -> str:
        """ "3", "2, 1 failed"."""
        others = {"failed": self.failed, "missing": self.missing}
        return ", ".join([str(self.finished), *(f"{n} {what}" for what, n in others.items() if n)])


@dataclass(frozen=True)
class ColumnGroup:
    """Columns side by side whose numbers come from the same runs.

    The fields are those of a table's "parts" in report.json.

    Args:
        experiment: what was run.
        heading: stands above the headings of all `columns`.
        reference: name of the row that gaps are given to.
        trials: how many the paper's means are of.
    """

    experiment: str
    heading: str
    columns: Sequence[str]
    reference: str | None = None
    trials: int | None = None


@dataclass(frozen=True)
class Row:
    """`counts` has an entry, and `cells` a list of cells, for each group of the table's columns."""

    name: str
    label: str
    counts: Sequence[RunCount]
    cells: Sequence[Sequence[Cell]]

    @property
    def all_cells(self) -> list[Cell]:
        return [cell for group in self.cells for cell in group]


@dataclass(frozen=True)
class Table:
    """Rows under groups of columns.

    Args:
        heads: what stands above the rows' labels, and above their counts.
        source: where the published numbers are from.
        notes: what must be read with our numbers.
    """

    title: str
    groups: Sequence[ColumnGroup]
    rows: Sequence[Row]
    heads: tuple[str, str] = ("pre-train", "")
    name: str = ""
    source: str = ""
    notes: Sequence[str] = ()

    @property
    def headings(self) -> list[str]:
        """Of every column, with its group's."""
        return [
            f"{group.heading} {name}".strip() for group in self.groups for name in group.columns
        ]

    @property
    def reference_labels(self) -> str:
        """The rows that gaps are given to, each once: "super.", or "super. / random init."."""
        labels = {row.name: row.label for row in self.rows}
        names = dict.fromkeys(group.reference for group in self.groups if group.reference)
        return " / ".join(labels[name] for name in names)


# -- numbers as text ------------------------------------------------------------------------------


def decimals_of(metric: str | None) -> int:
    """What is printed of its values: one of a percentage, more of metres."""
    return 3 if metric == "depth/rmse" else 1


def number_text(number: float | None, decimals: int = 1) -> str:
    return "" if number is None else f"{number:.{decimals}f}"


def mean_text(cell: Cell) -> str:
    """ "55.9 ± 0.2", "55.9" of one run, "" of none."""
    return cell.summary.text(cell.decimals) if cell.summary else ""


def difference_text(difference: Difference | None, decimals: int = 1) -> str:
    """ "+0.3", with a mark where it is significant; "" for None."""
    if difference is None:
        return ""
    return signed(difference.value, decimals) + (SIGNIFICANT if difference.significant else "")


def count_text(row: Row) -> str:
    """ "n = 5", "n = 5 / 3" where groups differ, "" where nothing was run."""
    finished = [count.finished for count in row.counts]
    if not any(finished):
        return ""
    same = len(set(finished)) == 1
    return "n = " + " / ".join(map(str, finished[:1] if same else finished))


# -- Markdown, CSV, JSON --------------------------------------------------------------------------


def markdown_table(table: Table) -> str:
    """As the paper has it, with up to four lines for a row: ours, the paper's, the differences."""
    lines = []
    for row in table.rows:
        printed = _lines_of(row, table.reference_labels) or {"": [""] * len(table.headings)}
        label = row.label
        for what, texts in printed.items():
            lines.append([label, what, *texts])
            label = ""  # on the row's first line only
    return tabulate(lines, [*table.heads, *table.headings], "pipe", disable_numparse=True)


def _lines_of(row: Row, reference_labels: str) -> dict[str, list[str]]:
    """What a line says -> its text in each column, for the lines that say anything."""
    cells = row.all_cells
    lines = {
        f"ours ({count_text(row)})": [mean_text(cell) for cell in cells],
        "paper": [number_text(cell.published, cell.decimals) for cell in cells],
        "ours − paper": [difference_text(cell.from_published, cell.decimals) for cell in cells],
        f"gap to {reference_labels}": [
            difference_text(cell.from_reference, cell.decimals) for cell in cells
        ],
    }
    return {name: texts for name, texts in lines.items() if any(texts)}


def means_table(table: Table) -> str:
    """Markdown with one line for a row: its label, its count, its means."""
    lines = [
        [row.label, row.counts[0].text(), *map(mean_text, row.all_cells)] for row in table.rows
    ]
    return tabulate(lines, [*table.heads, *table.headings], "pipe", disable_numparse=True)


CSV_COLUMNS = (
    "table", "experiment", "row", "column", "published", "published_trials", "mean", "sd", "n",
    "minus_published", "minus_published_spread", "minus_published_marked",
    "reference", "minus_reference", "minus_reference_spread", "minus_reference_marked", "notes",
)  # fmt: skip


def tables_csv(tables: Iterable[Table]) -> str:
    """A line for each cell, at full precision, under `CSV_COLUMNS`."""
    return _csv(CSV_COLUMNS, (line for table in tables for line in _csv_lines(table)))


def _csv_lines(table: Table) -> Iterable[list]:
    for row in table.rows:
        for group, cells in zip(table.groups, row.cells, strict=True):
            for column, cell in zip(group.columns, cells, strict=True):
                numbers = cell_json(cell)
                yield [
                    table.name, group.experiment, row.name, column,
                    cell.published, group.trials,
                    numbers["mean"], numbers["sd"], numbers["n"],
                    *_difference_values(numbers["from_published"]),
                    group.reference, *_difference_values(numbers["from_reference"]),
                    " ".join(table.notes),
                ]  # fmt: skip


def _difference_values(difference: Mapping[str, Any] | None) -> list:
    return list(difference.values()) if difference else [None] * 3


def means_csv(table: Table) -> str:
    """Label and counts of a row, then mean and sd of each column, at full precision."""
    columns = [f"{name} {number}" for name in table.headings for number in ("mean", "sd")]
    lines = []
    for row in table.rows:
        (count,) = row.counts
        summaries = [cell.summary for cell in row.all_cells]
        numbers = [n for s in summaries for n in ((s.mean, s.sd) if s else (None, None))]
        lines.append([row.label, count.finished, count.failed, count.missing, *numbers])
    return _csv([*table.heads, "failed", "missing", *columns], lines)


def _csv(heads: Sequence[str], lines: Iterable[Sequence]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    return text.getvalue()


def table_json(table: Table) -> dict[str, Any]:
    """For report.json."""
    return {
        "name": table.name,
        "title": table.title,
        "source": table.source,
        "stamps": list(table.notes),
        "parts": [asdict(group) for group in table.groups],
        "rows": [
            {
                "row": row.name,
                "label": row.label,
                "runs": [{"finished": c.finished, "wanted": c.wanted} for c in row.counts],
                "cells": [[cell_json(cell) for cell in group] for group in row.cells],
            }
            for row in table.rows
        ],
    }


def cell_json(cell: Cell) -> dict[str, Any]:
    summary = asdict(cell.summary) if cell.summary else {"mean": None, "sd": None, "n": 0}
    return {
        "published": cell.published,
        **summary,
        "values": dict(cell.values),
        "from_published": _difference_json(cell.from_published),
        "from_reference": _difference_json(cell.from_reference),
    }


def _difference_json(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    value, margin, significant = difference.value, difference.margin, difference.significant
    return {"value": value, "spread": margin, "marked": significant}


# -- trials without a paper: runs side by side, ablations -----------------------------------------

# Task -> its name in a heading, and the metrics that the papers report; AP50 first, as for VOC.
TASKS = {
    "bbox": ("", ("AP50", "AP", "AP75")),
    "segm": ("mask ", ("AP50", "AP", "AP75")),
    "keypoints": ("keypoint ", ("AP50", "AP", "AP75")),
    "densepose_gps": ("dense pose ", ("AP50", "AP", "AP75")),
    "sem_seg": ("", ("mIoU",)),
    "depth": ("depth ", ("rmse",)),  # in metres
}

Numbers = Mapping[int, Mapping[str, float]]  # trial -> what was measured -> value


def trials_table(
    title: str,
    heads: tuple[str, str],
    rows: Mapping[str, tuple[RunCount, Numbers]],
    columns: Mapping[str, str],
) -> Table:
    """A row for each name, a column for each of `columns`, measured -> heading.

    A cell is empty where one of the row's trials lacks the number.
    """

    def cell(numbers: Numbers, measured: str) -> Cell:
        complete = all(measured in trial for trial in numbers.values())
        values = {n: trial[measured] for n, trial in numbers.items()} if complete else {}
        return Cell(values, decimals=decimals_of(measured))

    return Table(
        title,
        [ColumnGroup("", "", list(columns.values()))],
        [
            Row(name, name, [count], [[cell(numbers, measured) for measured in columns]])
            for name, (count, numbers) in rows.items()
        ],
        heads,
    )


def compare_runs(runs: Mapping[str, Sequence[Path]]) -> Table:
    """What runs were evaluated for; `runs`: row -> OUTPUT_DIRs, one for each trial.

    A folder that cannot be read is a missing trial, and the table's notes say why.

    Raises:
        UserError: no folder holds an evaluated run.
    """
    counts, results, notes = {}, {}, []
    for name, folders in runs.items():
        results[name] = {}
        for trial, folder in enumerate(folders, start=1):
            try:
                results[name][trial] = _evaluation(folder)
            except UserError as error:
                notes.append(f"{name}: unreadable: {error}")
        finished = len(results[name])
        counts[name] = RunCount(finished, missing=len(folders) - finished)
    if not any(results.values()):
        raise UserError(notes[0].removeprefix(f"{next(iter(runs))}: unreadable: "))
    found = {key for trials in results.values() for trial in trials.values() for key in trial}
    columns = {
        f"{task}/{metric}": prefix + metric
        for task, (prefix, metrics) in TASKS.items()
        for metric in metrics
        if f"{task}/{metric}" in found
    }
    rows = {name: (counts[name], trials) for name, trials in results.items()}
    return replace(trials_table("", ("start", "trials"), rows, columns), notes=notes)


def _evaluation(folder: Path) -> dict[str, float]:
    if not os.path.lexists(folder / "metrics.json"):
        raise UserError(f"{folder} holds no metrics.json: name the OUTPUT_DIR of a finished run")
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder / 'metrics.json'} holds no evaluation: the run is not finished")
    return results


def ablation_table(trials: Sequence, failures: Mapping[str, str], title: str = "") -> Table:
    """Rows in the trials' order; columns in that of the row with the most measures.

    Args:
        trials: with `row`, `seed`, `name` and `result()`, {measures, seconds} or None.
        failures: by the names of the trials that failed.
    """
    rows = {}
    for name in dict.fromkeys(trial.row for trial in trials):
        own = [trial for trial in trials if trial.row == name]
        numbers = {trial.seed: trial.result()["measures"] for trial in own if trial.result()}
        failed = sum(trial.name in failures for trial in own)
        rows[name] = RunCount(len(numbers), failed, len(own) - len(numbers) - failed), numbers
    measured = [list(measures) for _, numbers in rows.values() for measures in numbers.values()]
    measured.sort(key=len, reverse=True)  # stable: the first of the longest leads
    columns = dict.fromkeys(name for measures in measured for name in measures)
    return trials_table(title, ("varied", "n"), rows, {name: name for name in columns})


def write_ablation(
    trials: Sequence, failures: Mapping[str, str], title: str, about: Mapping, folder: Path
) -> str:
    """Write table.md, table.csv and table.json into `folder`; returns the Markdown.

    Args:
        trials, failures: see `ablation_table`.
        about: what else to keep in the JSON: settings, machine, versions.
    """
    table = ablation_table(trials, failures, title)
    text = f"{title}\n\n{means_table(table)}\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", means_csv(table))
    rows = [_ablation_row_json(row, table.headings, trials) for row in table.rows]
    write_json(folder / "table.json", {"title": title, "rows": rows, **about})
    return text


def _ablation_row_json(row: Row, headings: Sequence[str], trials: Sequence) -> dict[str, Any]:
    finished = [t for t in trials if t.row == row.name and t.result()]
    summaries = {name: c.summary for name, c in zip(headings, row.all_cells, strict=True)}
    (count,) = row.counts
    return {
        "row": row.name,
        "trials": [{"seed": trial.seed, **trial.result()} for trial in finished],
        "failed": count.failed,
        "missing": count.missing,
        "spread": {
            name: {"mean": s.mean, "deviation": s.sd, "n": s.n}
            for name, s in summaries.items()
            if s
        },
    }
