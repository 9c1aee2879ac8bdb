"""The report of a reproduction: finished runs as the paper's tables, with curves and pictures.

report.html for people, report.md, report.csv and report.json with the same numbers. Nothing is run
here: a cell without a finished run is empty, and a table says what is missing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moco_det.benchmark.jobs.grid import AnyExperiment, AnyRun, EncoderRun, Grid, Part
from moco_det.benchmark.jobs.grid import Table as PaperTable
from moco_det.benchmark.jobs.job import FAILED, FINISHED, provenance
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import tables
from moco_det.benchmark.report.pages import SCORE_SHOWN, Points, Sample, line_chart, now, render
from moco_det.benchmark.report.tables import Cell, ColumnGroup, Row, RunCount, Table
from moco_det.benchmark.significance import difference_from_published, difference_of_trials
from moco_det.common.files import write_text

LINE_STYLES = 8  # in report.css

Values = Mapping[int, float]  # trial -> percent
Curves = Mapping[str, Mapping[str, Sequence[Points]]]
Pictures = Mapping[str, Sequence[Sequence[Sample]]]


@dataclass(frozen=True)
class Outcome:
    """What a run has left: its `record` is run.json, `results` are the last evaluation's.

    `shortened` says how much shorter than the paper's its schedule was; None: not at all.
    `problem`: why the run is unreadable, as one whose files are damaged is.
    """

    run: AnyRun
    state: str
    record: Mapping[str, Any]
    results: Mapping[str, float]
    shortened: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Report:
    """`checkpoints`: row -> file; `environment`: see `provenance`."""

    title: str
    created: str
    checkpoints: Mapping[str, str]
    environment: Mapping[str, Mapping[str, str]]
    tables: Sequence[Table]
    outcomes: Sequence[Outcome]

    def labels(self) -> dict[str, str]:
        """Name of a row -> what it is called in the tables."""
        return {row.name: row.label for table in self.tables for row in table.rows}


def write_report(report: Report, folder: Path, curves: Curves, pictures: Pictures) -> Path:
    """Write report.html, .md, .csv and .json into `folder`; returns the path of the page."""
    content = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    texts = {
        "html": render_page(report, curves, pictures),
        "md": markdown(report),
        "csv": tables.tables_csv(report.tables),
        "json": content + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        write_text(folder / f"report.{ending}", text)
    return folder / "report.html"


# -- from run folders to tables -------------------------------------------------------------------


def collect(
    grid: Grid,
    paper_tables: Sequence[PaperTable],
    runs: Sequence[AnyRun],
    settings: Settings,
    checkpoints: Mapping[str, Path],
) -> Report:
    """Read what the runs have left.

    Args:
        paper_tables, runs: those that were selected, see `Grid.runs`.
        checkpoints: row -> the user's file; rows that the paper lacks are added to every table.
    """
    outcomes = [read_outcome(run, settings) for run in runs]
    own_rows = grid.own_rows(checkpoints)
    return Report(
        title="Reproduction of MoCo's transfer tables",
        created=now(),
        checkpoints={row: str(path) for row, path in checkpoints.items()},
        environment=provenance(),
        tables=[make_table(grid, table, outcomes, own_rows) for table in paper_tables],
        outcomes=outcomes,
    )


def read_outcome(run: AnyRun, settings: Settings) -> Outcome:
    folder = settings.folder(run)
    found = folder.look()
    if found.state != FINISHED:
        return Outcome(run, found.state, found.record, {}, problem=found.problem)
    return Outcome(run, found.state, found.record, folder.results(), folder.shortened())


def make_table(
    grid: Grid, paper: PaperTable, outcomes: Sequence[Outcome], own_rows: Sequence[str]
) -> Table:
    """The paper's table, filled with our runs."""
    names, experiments = paper.rows(own_rows), [part.experiment for part in paper.parts]
    ours = [o for o in outcomes if o.run.experiment in experiments and o.run.row in names]
    return Table(
        name=paper.name,
        title=paper.title,
        source=paper.source,
        notes=[*filter(None, (grid.note, paper.note)), *_notes(ours)],
        groups=[
            ColumnGroup(
                experiment=part.experiment.name,
                heading=part.heading,
                columns=list(part.columns),
                reference=part.reference,
                trials=part.experiment.trials,
            )
            for part in paper.parts
        ],
        rows=[
            Row(
                name,
                grid.label(name),
                counts=[_count(_of(ours, part.experiment, name)) for part in paper.parts],
                cells=[_cells(part, name, ours) for part in paper.parts],
            )
            for name in names
        ],
    )


def _of(outcomes: Iterable[Outcome], experiment: AnyExperiment, row: str) -> list[Outcome]:
    return [o for o in outcomes if o.run.experiment == experiment and o.run.row == row]


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What a reader has to know before the numbers: what was changed, cut short, or is missing."""
    notes = [f"Shortened schedule: {o.shortened}." for o in outcomes if o.shortened]
    changes = filter(None, (_changes(outcome.run) for outcome in outcomes))
    notes += [f"Settings other than the config's: {text}." for text in changes]
    notes += [f"Unreadable: {o.run.name}: {o.problem}." for o in outcomes if o.problem]
    count = _count(outcomes)
    if count.finished < count.wanted:
        words = f"Incomplete: {count.finished} of {count.wanted} runs are finished"
        notes.append(f"{words}, {count.failed} failed." if count.failed else f"{words}.")
    return list(dict.fromkeys(notes))


def _changes(run: AnyRun) -> str:
    """The options of a run, but for its weights and the data sets' places."""
    if isinstance(run, EncoderRun):
        return ", ".join(f"{flag} {value}" for flag, value in run.changed.items())
    given = run.options[len(run.experiment.options) :]
    pairs = zip(given[::2], given[1::2], strict=True)
    return ", ".join(f"{key} {value}" for key, value in pairs if key != "MODEL.WEIGHTS")


def _count(outcomes: Sequence[Outcome]) -> RunCount:
    states = [outcome.state for outcome in outcomes]
    finished, failed = states.count(FINISHED), states.count(FAILED)
    return RunCount(finished, failed, missing=len(states) - finished - failed)


def _cells(part: Part, row: str, outcomes: Sequence[Outcome]) -> list[Cell]:
    published = part.published.get(row, [None] * len(part.columns))
    ours = _of(outcomes, part.experiment, row)
    reference = []
    if part.reference and row != part.reference:
        reference = _of(outcomes, part.experiment, part.reference)
    return [
        make_cell(
            _values(ours, metric), number, _values(reference, metric), part.experiment, metric
        )
        for number, metric in zip(published, part.columns.values(), strict=True)
    ]


def _values(outcomes: Sequence[Outcome], metric: str | None) -> Values:
    return {o.run.trial: o.results[metric] for o in outcomes if metric in o.results}


def make_cell(
    values: Values,
    published: float | None,
    reference: Values,
    experiment: AnyExperiment,
    metric: str | None,
) -> Cell:
    """A row's trials held against the paper's mean and against the trials of the reference row.

    `experiment` tells the paper's number of trials, and what is known of one trial's deviation.
    """
    known = (experiment.trial_sd or {}).get(metric)
    values = dict(sorted(values.items()))
    from_published = None
    if published is not None:
        trials = list(values.values())
        from_published = difference_from_published(trials, published, experiment.trials, known)
    common = [trial for trial in values if trial in reference]
    from_reference = difference_of_trials(
        [values[trial] for trial in common], [reference[trial] for trial in common], known
    )
    decimals = tables.decimals_of(metric)
    return Cell(values, published, from_published, from_reference, decimals)


def loss_curves(runs: Sequence[AnyRun], settings: Settings) -> Curves:
    """Experiment -> row -> a list of (iteration, loss) for each of its runs."""
    curves: dict[str, dict[str, list]] = {}
    for run in runs:
        rows, folder = curves.setdefault(run.experiment.name, {}), settings.folder(run)
        rows.setdefault(run.row, []).append([] if folder.look().problem else folder.losses())
    return curves


# -- what is written ------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """report.md: all tables, with what each has to say of itself above it."""
    sections = [f"# {report.title}", f"{report.created}. {tables.LEGEND}"]
    for table in report.tables:
        sections.append(f"## {table.title}")
        sections += [f"> **{note}**" for note in table.notes]
        sections.append(tables.markdown_table(table))
    failed = [outcome.run.name for outcome in report.outcomes if outcome.state == FAILED]
    if failed:
        sections.append("Failed: " + ", ".join(failed))
    sections += [f"{o.run.name}: {o.state}: {o.problem}" for o in report.outcomes if o.problem]
    return "\n\n".join(sections) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """The content of report.json."""
    return {
        "title": report.title,
        "created": report.created,
        "checkpoints": dict(report.checkpoints),
        "environment": report.environment,
        "tables": [tables.table_json(table) for table in report.tables],
        "runs": [
            {
                "name": outcome.run.name,
                "experiment": outcome.run.experiment.name,
                "row": outcome.run.row,
                "trial": outcome.run.trial,
                "state": outcome.state,
                "results": outcome.results,
                "record": outcome.record,
                "shortened": outcome.shortened,
                **({"problem": outcome.problem} if outcome.problem else {}),
            }
            for outcome in report.outcomes
        ],
    }


def render_page(report: Report, curves: Curves, pictures: Pictures) -> Markup:
    """report.html; `pictures`: experiment -> `pages.sample_pictures`."""
    records = [outcome.record for outcome in report.outcomes if outcome.record]
    return render(
        "reproduction.html.j2",
        title=report.title,
        report=report,
        labels=report.labels(),
        finished=sum(outcome.state == FINISHED for outcome in report.outcomes),
        legend=tables.LEGEND,
        plots=_plots(report, curves),
        pictures={name: images for name, images in pictures.items() if images},
        score_shown=SCORE_SHOWN,
        provenance=_told_once(records),
        commands="\n\n".join(record.get("command", "") for record in records),
    )


def _plots(report: Report, curves: Curves) -> list[tuple[str, Markup, list[tuple[str, str]]]]:
    """(experiment, chart, [(style of a line, what it is)]) where any run has logged a loss."""
    rows = dict.fromkeys(outcome.run.row for outcome in report.outcomes)
    styles = {row: f"s{index % LINE_STYLES}" for index, row in enumerate(rows)}
    labels, plots = report.labels(), []
    for experiment, runs_of in curves.items():
        lines = [(styles[row], run) for row, runs in runs_of.items() for run in runs if run]
        if lines:
            described = f"One line per run, of {', '.join(labels[row] for row in runs_of)}."
            chart = line_chart(experiment, described, lines, "iteration", "training loss")
            key = [(styles[row], labels[row]) for row, runs in runs_of.items() if any(runs)]
            plots.append((experiment, chart, key))
    return plots


def _told_once(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the runs say of code, machine and packages, each different text once."""
    entries: dict[str, dict[str, None]] = {}
    for record in records:
        for group in ("code", "hardware", "packages"):
            for name, text in record.get(group, {}).items():
                entries.setdefault(name, {})[str(text)] = None
    return {name: "; ".join(texts) for name, texts in entries.items()}
