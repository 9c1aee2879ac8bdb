"""Finished runs as tables: the dict that all forms of the report are written from.

    tables    [{name, title, source, stamps, parts, rows}], laid out as in the paper
      parts     [{experiment, heading, columns, reference, trials}]; `trials` is the paper's number
      rows      [{row, label, runs, cells}]; of each part `runs` counts {finished, wanted}, and
                `cells` is a list
      cell      {published, mean, sd, n, values, from_published, from_reference}; numbers are in
                percent, or None; `values` is {trial: number}; the last two are None or {value,
                spread, marked}
    runs      [{name, experiment, row, trial, state, results, record, shortened}]

A cell without a finished run has neither mean nor differences, a single trial no deviation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from moco_det.benchmark.jobs.grid import Grid, Part, Run, Table
from moco_det.benchmark.jobs.job import FAILED, FINISHED
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.significance import (
    Difference,
    Spread,
    difference_from_published,
    difference_of_trials,
)

Values = Mapping[int, float]  # trial -> percent


def collect(
    grid: Grid, tables: Sequence[Table], runs: Sequence[Run], settings: Settings, own: Sequence[str]
) -> dict[str, Any]:
    """Read what the runs have left.

    Args:
        tables, runs: those that were selected, see `Grid.runs`.
        own: rows that the paper lacks.
    """
    outcomes = [_outcome(run, settings) for run in runs]
    return {
        "tables": [_table(grid, table, runs, outcomes, own) for table in tables],
        "runs": outcomes,
    }


def _outcome(run: Run, settings: Settings) -> dict[str, Any]:
    folder = settings.folder(run)
    state = folder.state()
    return {
        "name": run.name,
        "experiment": run.experiment.name,
        "row": run.row,
        "trial": run.trial,
        "state": state,
        "results": folder.results() if state == FINISHED else {},
        "record": folder.record,
        "shortened": _shortened(run, folder.path / "config.yaml") if state == FINISHED else None,
    }


def _shortened(run: Run, config) -> str | None:
    """How much shorter than the paper's the schedule of a finished run was; None: not at all."""
    solver = yaml.safe_load(config.read_text())["SOLVER"]
    experiment = run.experiment
    iterations, batch = solver["MAX_ITER"], solver["IMS_PER_BATCH"]
    share = iterations * batch / (experiment.iterations * experiment.batch)
    if share >= 1:
        return None
    return (
        f"{experiment.name} ran {iterations} iterations of {batch} images, {100 * share:.2g} % of "
        f"the paper's {experiment.iterations} of {experiment.batch}"
    )


def _table(grid: Grid, table: Table, runs, outcomes, own: Sequence[str]) -> dict[str, Any]:
    experiments = {part.experiment.name for part in table.parts}
    rows = table.rows(own)
    ours = [o for o in outcomes if o["experiment"] in experiments and o["row"] in rows]
    return {
        "name": table.name,
        "title": table.title,
        "source": table.source,
        "stamps": [*([grid.note] if grid.note else []), *_stamps(runs, ours)],
        "parts": [
            {
                "experiment": part.experiment.name,
                "heading": part.heading,
                "columns": list(part.columns),
                "reference": part.reference,
                "trials": part.experiment.trials,
            }
            for part in table.parts
        ],
        "rows": [
            {
                "row": row,
                "label": grid.label(row),
                "runs": [_count(part, row, ours) for part in table.parts],
                "cells": [_cells(part, row, ours) for part in table.parts],
            }
            for row in rows
        ],
    }


def _stamps(runs: Sequence[Run], ours: Sequence[Mapping]) -> list[str]:
    """What a reader has to know before the numbers: what was changed, cut short, or is missing."""
    stamps = [f"Shortened schedule: {o['shortened']}." for o in ours if o["shortened"]]
    names = {outcome["name"] for outcome in ours}
    changed = [_changes(run) for run in runs if run.name in names]
    stamps += [f"Settings other than the config's: {text}." for text in changed if text]
    unfinished = [outcome for outcome in ours if outcome["state"] != FINISHED]
    if unfinished:
        failed = sum(outcome["state"] == FAILED for outcome in unfinished)
        words = f"{len(ours) - len(unfinished)} of {len(ours)} runs are finished"
        stamps.append(
            f"Incomplete: {words}, {failed} failed." if failed else f"Incomplete: {words}."
        )
    return list(dict.fromkeys(stamps))


def _changes(run: Run) -> str:
    """The options of a run, but for its weights and the data sets' places."""
    given = run.options[len(run.experiment.options) :]
    pairs = zip(given[::2], given[1::2], strict=True)
    return ", ".join(f"{key} {value}" for key, value in pairs if key != "MODEL.WEIGHTS")


def _count(part: Part, row: str, outcomes) -> dict[str, int]:
    own = [o for o in outcomes if o["experiment"] == part.experiment.name and o["row"] == row]
    return {"finished": sum(o["state"] == FINISHED for o in own), "wanted": len(own)}


def _cells(part: Part, row: str, outcomes) -> list[dict[str, Any]]:
    published = part.published.get(row, [None] * len(part.columns))
    cells = []
    for number, metric in zip(published, part.columns.values(), strict=True):
        values = _values(part, row, metric, outcomes)
        reference = {}
        if part.reference and row != part.reference:
            reference = _values(part, part.reference, metric, outcomes)
        cells.append(cell(values, number, reference, part.experiment, metric))
    return cells


def _values(part: Part, row: str, metric: str | None, outcomes) -> dict[int, float]:
    return {
        outcome["trial"]: outcome["results"][metric]
        for outcome in outcomes
        if outcome["experiment"] == part.experiment.name
        and outcome["row"] == row
        and metric in outcome["results"]
    }


def cell(
    values: Values, published: float | None, reference: Values, experiment, metric: str | None
) -> dict[str, Any]:
    """One cell of a table; see the head of this module.

    Args:
        values, reference: our trials of this row, and of the row that gaps are given to; they are
            compared by the trials that both have.
        published: the paper's mean.
        experiment: tells the paper's number of trials, and what is known of one trial's deviation.
    """
    trials = [values[trial] for trial in sorted(values)]
    spread = Spread.of(trials) if trials else None
    known = (experiment.trial_sd or {}).get(metric)
    from_published = None
    if published is not None:
        from_published = difference_from_published(trials, published, experiment.trials, known)
    common = sorted(values.keys() & reference.keys())
    from_reference = difference_of_trials(
        [values[t] for t in common], [reference[t] for t in common], known
    )
    return {
        "published": published,
        "mean": spread and spread.mean,
        "sd": spread and spread.deviation,
        "n": spread.n if spread else 0,
        "values": dict(sorted(values.items())),
        "from_published": _plain(from_published),
        "from_reference": _plain(from_reference),
    }


def _plain(difference: Difference | None) -> dict[str, Any] | None:
    return difference and asdict(difference) | {"marked": difference.marked}
