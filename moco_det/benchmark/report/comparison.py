"""Finished runs as one table: a row per start, mean and deviation over its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from moco_det.benchmark.jobs.runs import read_results
from moco_det.benchmark.significance import Spread
from moco_det.common.errors import UserError

# Task -> its name in a heading, and the metrics that the papers report; AP50 first, as for VOC.
TASKS = {
    "bbox": ("", ("AP50", "AP", "AP75")),
    "segm": ("mask ", ("AP50", "AP", "AP75")),
    "keypoints": ("keypoint ", ("AP50", "AP", "AP75")),
    "densepose_gps": ("dense pose ", ("AP50", "AP", "AP75")),
    "sem_seg": ("", ("mIoU",)),
}


def comparison(runs: Mapping[str, Sequence[Path]]) -> str:
    """A table of what the runs were evaluated for, in percent.

    Args:
        runs: name of a row -> OUTPUT_DIRs of its runs, one per trial.

    Cells are means; with two or more trials the standard deviation (n - 1) follows. A single trial
    has none, and gets none. A row that was not evaluated for a metric has an empty cell.

    Raises:
        UserError: a folder holds no evaluated run.
    """
    results = {name: [_read(folder) for folder in folders] for name, folders in runs.items()}
    found = {key for trials in results.values() for trial in trials for key in trial}
    columns = {
        f"{task}/{metric}": prefix + metric
        for task, (prefix, metrics) in TASKS.items()
        for metric in metrics
        if f"{task}/{metric}" in found
    }
    rows = [
        [name, len(trials), *(_cell(trials, key) for key in columns)]
        for name, trials in results.items()
    ]
    heads = ["start", "trials", *columns.values()]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)


def _read(folder: Path) -> dict[str, float]:
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} holds no metrics.json: name the OUTPUT_DIR of a finished run")
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder / 'metrics.json'} holds no evaluation: the run is not finished")
    return results


def _cell(trials: Sequence[Mapping[str, float]], key: str) -> str:
    values = [trial[key] for trial in trials if key in trial]
    return Spread.of(values).text() if len(values) == len(trials) else ""
