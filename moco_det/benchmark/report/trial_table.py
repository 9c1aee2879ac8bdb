"""Finished trials as a table of means and deviations: Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from moco_det.benchmark.jobs.ablation import Trial
from moco_det.benchmark.significance import Spread
from moco_det.common.files import write_json


def collect(trials: Sequence[Trial], failures: dict[str, str]) -> list[dict]:
    """A dict for each row, in the trials' order: {row, trials, failed, missing, spread}.

    `row` is its name; `trials` are the finished ones as [{seed, measures, seconds}]; `failed` and
    `missing` count those that failed, as `run_trials` says, or did not run; `spread` is
    {measure: Spread} over the finished ones.
    """
    rows = []
    for name in dict.fromkeys(trial.row for trial in trials):
        own = [trial for trial in trials if trial.row == name]
        finished = [{"seed": t.seed} | t.result() for t in own if t.result()]
        failed = sum(trial.name in failures for trial in own)
        measures = finished[0]["measures"] if finished else {}
        spread = {
            measure: Spread.of([trial["measures"][measure] for trial in finished])
            for measure in measures
        }
        missing = len(own) - len(finished) - failed
        row = {"row": name, "trials": finished, "failed": failed, "missing": missing}
        rows.append(row | {"spread": spread})
    return rows


def markdown(rows: Sequence[dict]) -> str:
    """Cells are "mean ± deviation"; empty where a row lacks a measure or a finished trial."""
    measures = measures_of(rows)
    lines = []
    for row in rows:
        cells = [row["spread"][m].text() if m in row["spread"] else "" for m in measures]
        lines.append([row["row"], _count(row), *cells])
    return tabulate(lines, ["varied", "n", *measures], tablefmt="pipe", disable_numparse=True)


def _count(row: dict) -> str:
    """The number of finished trials, and what became of the others."""
    others = [f"{row[state]} {state}" for state in ("failed", "missing") if row[state]]
    return ", ".join([str(len(row["trials"])), *others])


def measures_of(rows: Sequence[dict]) -> list[str]:
    """All rows' measures, in the order of the row that has most of them."""
    longest = max((list(row["spread"]) for row in rows), key=len)
    others = [measure for row in rows for measure in row["spread"]]
    return list(dict.fromkeys([*longest, *others]))


def as_csv(rows: Sequence[dict]) -> str:
    """Columns: varied, n, failed, missing, then each measure's mean and sd at full precision."""
    measures = measures_of(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{measure} {part}" for measure in measures for part in ("mean", "sd")]
    writer.writerow(["varied", "n", "failed", "missing", *heads])
    for row in rows:
        spreads = [row["spread"].get(measure) for measure in measures]
        cells = [cell for s in spreads for cell in ((s.mean, s.deviation) if s else ("", ""))]
        writer.writerow([row["row"], len(row["trials"]), row["failed"], row["missing"], *cells])
    return text.getvalue()


def write_table(rows: Sequence[dict], title: str, about: dict, output: Path) -> str:
    """Write table.md, table.csv and table.json under `output`; returns the Markdown.

    Args:
        rows: of `collect`.
        about: what else to keep in the JSON: settings, machine, versions.
    """
    text = f"{title}\n\n{markdown(rows)}\n"
    (output / "table.md").write_text(text)
    (output / "table.csv").write_text(as_csv(rows))
    plain = [
        row | {"spread": {name: vars(spread) for name, spread in row["spread"].items()}}
        for row in rows
    ]
    write_json(output / "table.json", {"title": title, "rows": plain} | about)
    return text
