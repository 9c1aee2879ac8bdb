"""The tables of `results.collect` as Markdown and CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from moco_det.benchmark.significance import Spread, signed

MARK = "*"
LEGEND = (
    "In percent. Ours: mean ± sample standard deviation of n runs; one run has no deviation, and "
    "an empty cell has not been run. A gap to another row is taken over the trials that both have. "
    f"{MARK} marks a difference that chance does not explain: beyond the two-sided 95 % interval "
    "of Student's t for two means of one deviation, which is pooled from the runs at hand and, for "
    "AP on COCO, from what is known of single runs (0.15)."
)
CSV_COLUMNS = (
    "table", "experiment", "row", "column", "published", "published_trials", "mean", "sd", "n",
    "minus_published", "minus_published_spread", "minus_published_marked",
    "reference", "minus_reference", "minus_reference_spread", "minus_reference_marked", "notes",
)  # fmt: skip


def mean_text(cell: Mapping[str, Any]) -> str:
    """ "55.9 ± 0.2", "55.9" of one run, "" of none."""
    return Spread(cell["mean"], cell["sd"], cell["n"]).text() if cell["n"] else ""


def difference_text(difference: Mapping[str, Any] | None) -> str:
    """ "+0.3", with the mark where it is due; "" for None."""
    if difference is None:
        return ""
    return signed(difference["value"]) + (MARK if difference["marked"] else "")


def number_text(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"


def n_text(row: Mapping[str, Any]) -> str:
    """ "n = 5", "n = 5 / 3" where the parts differ, "" where nothing was run."""
    counts = [count["finished"] for count in row["runs"]]
    if not any(counts):
        return ""
    return "n = " + (str(counts[0]) if len(set(counts)) == 1 else " / ".join(map(str, counts)))


def lines_of(row: Mapping[str, Any], references: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(what the line says, a text for each column), of what the row has."""
    cells = [cell for part in row["cells"] for cell in part]
    lines = {
        f"ours ({n_text(row)})": [mean_text(cell) for cell in cells],
        "paper": [number_text(cell["published"]) for cell in cells],
        "ours − paper": [difference_text(cell["from_published"]) for cell in cells],
        f"gap to {' / '.join(references)}": [difference_text(c["from_reference"]) for c in cells],
    }
    yield from ((name, texts) for name, texts in lines.items() if any(texts))


def headings(table: Mapping[str, Any]) -> list[str]:
    parts = table["parts"]
    return [f"{part['heading']} {name}".strip() for part in parts for name in part["columns"]]


def references(table: Mapping[str, Any]) -> list[str]:
    """Labels of the rows that gaps are given to, each once."""
    labels = {row["row"]: row["label"] for row in table["rows"]}
    rows = [part["reference"] for part in table["parts"] if part["reference"]]
    return [labels[row] for row in dict.fromkeys(rows)]


def markdown_table(table: Mapping[str, Any]) -> str:
    lines, columns = [], headings(table)
    for row in table["rows"]:
        own = list(lines_of(row, references(table))) or [("", [""] * len(columns))]
        lines += [
            [row["label"] if index == 0 else "", name, *texts]
            for index, (name, texts) in enumerate(own)
        ]
    head = ["pre-train", "", *columns]
    return tabulate(lines, head, "pipe", disable_numparse=True)


def markdown(results: Mapping[str, Any]) -> str:
    """report.md: all tables, with what each has to say of itself above it."""
    sections = [f"# {results['title']}", f"{results['created']}. {LEGEND}"]
    for table in results["tables"]:
        sections.append(f"## {table['title']}")
        sections += [f"> **{stamp}**" for stamp in table["stamps"]]
        sections.append(markdown_table(table))
    failed = [run["name"] for run in results["runs"] if run["state"] == "failed"]
    if failed:
        sections.append("Failed: " + ", ".join(failed))
    return "\n\n".join(sections) + "\n"


def as_csv(results: Mapping[str, Any]) -> str:
    """report.csv: a line for each cell, at full precision, under `CSV_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in results["tables"]:
        for row in table["rows"]:
            for part, cells in zip(table["parts"], row["cells"], strict=True):
                for column, cell in zip(part["columns"], cells, strict=True):
                    writer.writerow(_csv_line(table, part, row, column, cell))
    return text.getvalue()


def _csv_line(table, part, row, column: str, cell) -> list:
    def parts(difference):
        keys = ("value", "spread", "marked")
        return [difference[key] for key in keys] if difference else [None] * 3

    return [
        table["name"], part["experiment"], row["row"], column, cell["published"], part["trials"],
        cell["mean"], cell["sd"], cell["n"], *parts(cell["from_published"]),
        part["reference"], *parts(cell["from_reference"]), " ".join(table["stamps"]),
    ]  # fmt: skip
