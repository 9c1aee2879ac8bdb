"""Finished detector runs as one table: a row per start, mean and deviation over its runs."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from moco_det.benchmark.outcome import read_ap
from moco_det.errors import UserError

COLUMNS = ("AP50", "AP", "AP75")  # the papers' order for VOC


def comparison(runs: Mapping[str, Sequence[Path]]) -> str:
    """A table of box AP in percent.

    Args:
        runs: name of a row -> OUTPUT_DIRs of its runs, one per trial.

    Cells are means; with two or more trials the standard deviation (n - 1) follows. A single trial
    has none, and gets none.

    Raises:
        UserError: a folder holds no evaluated run.
    """
    rows = []
    for name, folders in runs.items():
        trials = [_read(folder) for folder in folders]
        cells = [_cell([trial[column] for trial in trials]) for column in COLUMNS]
        rows.append([name, len(trials), *cells])
    return tabulate(rows, ["start", "trials", *COLUMNS], tablefmt="pipe", disable_numparse=True)


def _read(folder: Path) -> dict[str, float]:
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} holds no metrics.json: name the OUTPUT_DIR of a finished run")
    return read_ap(folder)


def _cell(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
