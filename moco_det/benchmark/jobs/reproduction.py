"""Checkpoints in, tables out: what tools/reproduce.py does.

OUTPUT/weights/, OUTPUT/runs/      see `runs`
OUTPUT/report.{html,md,csv,json}
OUTPUT/data/, OUTPUT/pretrain/     of the toy reproduction: drawn images, and the checkpoint that
                                   a minute of MoCo on them makes
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_det.benchmark.jobs import slurm
from moco_det.benchmark.jobs.encoder_runs import parsed
from moco_det.benchmark.jobs.grid import (
    FOLDER,
    AnyRun,
    ClassifierRun,
    Grid,
    Run,
    Table,
    load_grid,
)
from moco_det.benchmark.jobs.job import FINISHED, Job, JobFolder, script_job, unfinished
from moco_det.benchmark.jobs.preflight import preflight
from moco_det.benchmark.jobs.runner import gpu_slots, run_in_order, run_side_by_side
from moco_det.benchmark.jobs.runs import Settings, convert, weight_file
from moco_det.benchmark.report import reproduction as report
from moco_det.benchmark.report.pages import sample_pictures
from moco_det.common.errors import UserError
from moco_det.common.installation import own_file

QUICK_RECIPE = "configs/pretrain/reproduce_quick_r50.yaml"
QUICK_ROW = "moco"  # of quick.yaml


@dataclass(frozen=True)
class Reproduction:
    """What to run. `checkpoints`: row -> file; `trials`: their numbers, None for the paper's;
    `options`: config keys and values of detectors; `flags`: of classifiers, see `Grid.runs`."""

    grid: Grid
    tables: Sequence[Table]
    checkpoints: Mapping[str, Path]
    trials: Sequence[int] | None
    options: Sequence[str]
    settings: Settings
    flags: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[AnyRun]:
        """Raises UserError for a config that does not exist."""
        output, configs = self.settings.output, own_file("configs")
        files = {name: weight_file(name, at, output) for name, at in self.checkpoints.items()}
        runs = self.grid.runs(
            self.tables, files, self.trials, configs, self.options, self.checkpoints, self.flags
        )
        detectors = [run for run in runs if isinstance(run, Run)]
        missing = {run.config_file for run in detectors if not run.config_file.is_file()}
        if missing:
            names = ", ".join(sorted(map(str, missing)))
            raise UserError(f"no such config: {names}; choose other --tables")
        return runs

    def rows_without_checkpoint(self) -> dict[str, str]:
        """Row of the tables that needs a checkpoint and has none -> arguments of pretrain/main.py
        that make one, where the paper says how."""
        names = dict.fromkeys(row for table in self.tables for row in table.rows(()))
        rows = [self.grid.rows[name] for name in names if name not in self.checkpoints]
        return {row.name: f"{row.images} {row.pretrain}" for row in rows if row.pretrain}

    def rows_in_no_table(self) -> list[str]:
        """Rows of the papers that a checkpoint is given for and none of the tables has."""
        rows = {row for table in self.tables for row in table.rows(())}
        return [name for name in self.checkpoints if name in self.grid.rows and name not in rows]


def estimated_hours(run: AnyRun) -> float | None:
    """GPU hours; None where no speed of such a configuration is published."""
    hours = run.experiment.gpu_hours
    if hours is None:
        return None
    if isinstance(run, ClassifierRun):
        args = parsed(run)
        share = args.epochs / run.experiment.epochs
        return hours * share if args.arch == "resnet50" else None
    given = dict(zip(run.options[::2], run.options[1::2], strict=True))
    iterations = int(given.get("SOLVER.MAX_ITER", run.experiment.iterations))
    batch = int(given.get("SOLVER.IMS_PER_BATCH", run.experiment.batch))
    return hours * iterations * batch / (run.experiment.iterations * run.experiment.batch)


def problems(plan: Reproduction, local: bool, toy: bool, ahead: bool = False) -> list[str]:
    """What keeps the plan's runs from a good end; see `preflight`."""
    settings = plan.settings
    files = {name: weight_file(name, at, settings.output) for name, at in plan.checkpoints.items()}
    made = {str(file) for name, file in files.items() if file != plan.checkpoints[name]}
    made |= {str(file) for file in plan.checkpoints.values() if not file.is_file()}
    return preflight(plan.runs(), settings, made, local, toy, ahead)


def dry_run(plan: Reproduction) -> str:
    """What would run, with its GPU hours."""
    runs = [run for run in plan.runs() if plan.settings.folder(run).look().state != FINISHED]
    rows, total, unknown = [], 0.0, 0
    for run in runs:
        hours = estimated_hours(run)
        total, unknown = total + (hours or 0.0), unknown + (hours is None)
        source = run.experiment.measured if hours is not None else ""
        rows.append([run.name, "unknown" if hours is None else f"{hours:.1f}", source])
    table = tabulate(rows, ["run", "GPU hours", "by the speed of"], "simple", disable_numparse=True)
    more = f", and {unknown} runs whose time is unknown" if unknown else ""
    text = (
        f"{table}\n\n{len(runs)} runs to do: {total:.0f} GPU hours{more}. Estimates for V100s, "
        "from the training speeds that are named, mostly of Detectron2's model zoo; evaluation of "
        "detectors is not counted."
    )
    lacking = plan.rows_without_checkpoint()
    if lacking:
        text += "\n\nRows without a checkpoint, which are not run. To pretrain them:"
        start = "torchrun --nproc_per_node 8 pretrain/main.py"
        for name, arguments in lacking.items():
            text += f"\n  {start} {arguments} --output output/pretrain/{name}"
        text += "\nand pass each as --weights ROW=output/pretrain/ROW/checkpoint_last.pth.tar"
    return text


def listed(found: Sequence[str]) -> str:
    """The problems that keep runs from a good end, for people."""
    count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
    lines = [f"error: {count} to put right before any run is begun:", *found]
    return "\n  ".join(lines)


def status(plan: Reproduction) -> str:
    """Every run's state, now."""
    rows, counts, problems = [], {}, []
    for run in plan.runs():
        folder = plan.settings.folder(run)
        found = folder.look()
        counts[found.state] = counts.get(found.state, 0) + 1
        progress = folder.progress() if found.record and found.state != FINISHED else ""
        attempts = len(found.record.get("attempts", [])) or ""
        rows.append([run.name, found.state, progress, attempts, slurm.job_of(folder) or ""])
        if found.problem:
            problems.append(f"{run.name}: {found.state}: {found.problem}\n")
    heads = ["run", "state", "", "attempts ended", "Slurm job"]
    table = tabulate(rows, heads, "simple", disable_numparse=True)
    total = ", ".join(f"{count} {state}" for state, count in counts.items())
    return "\n".join([table, "", *problems, total])


def reproduce(plan: Reproduction, at_a_time: int | None) -> list[Job]:
    """Run what is not finished on this machine; returns the jobs that failed.

    Args:
        at_a_time: runs at a time, see `gpu_slots`.
    """
    settings, todo = plan.settings, _to_do(plan)
    jobs = [settings.job(run) for run in todo]
    if not jobs:
        return []
    return run_side_by_side(jobs, gpu_slots(settings.gpus, at_a_time), settings.retries)


def submit_to_slurm(plan: Reproduction, parameters: Mapping[str, Any]) -> list[str]:
    """Submit what is neither finished nor waiting; returns the numbers of the Slurm jobs."""
    todo, settings = _to_do(plan), plan.settings
    folder = settings.output / "slurm"
    executor = slurm.make_executor(folder, parameters, settings.gpus)
    return [job.job_id for job in slurm.submit(todo, settings, executor, parameters["nodes"])]


def _to_do(plan: Reproduction) -> list[AnyRun]:
    """Convert the checkpoints that detectors start from; the runs that are not finished."""
    runs, settings = plan.runs(), plan.settings
    rows = {run.row for run in runs if isinstance(run, Run)}
    checkpoints = {row: file for row, file in plan.checkpoints.items() if row in rows}
    convert(checkpoints, settings.output)
    todo = {job.name for job in unfinished([settings.job(run) for run in runs])}
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished", flush=True)
    return [run for run in runs if run.name in todo]


def write_report(plan: Reproduction) -> Path:
    """Write report.html, .md, .csv and .json from what is there; returns the path of the page."""
    runs, settings = plan.runs(), plan.settings
    found = report.collect(plan.grid, plan.tables, runs, settings, plan.checkpoints)
    curves, pictures = report.loss_curves(runs, settings), sample_pictures(runs, settings)
    return report.write_report(found, settings.output, curves, pictures)


# -- the toy reproduction -------------------------------------------------------------------------


def quick_grid(output: Path) -> Grid:
    return load_grid(FOLDER / "quick.yaml", data=output / "data")


def quick_checkpoint(output: Path) -> dict[str, Path]:
    """Row -> the checkpoint that `prepare_quick` makes."""
    return {QUICK_ROW: output / "pretrain/checkpoint_last.pth.tar"}


def prepare_quick(output: Path, pretraining: bool) -> None:
    """Draw the images and, if `pretraining` is wanted, pretrain on them, each unless it is done.

    Raises:
        UserError: one of the two failed.
    """
    draw = ["-m", "moco_det.benchmark.synthetic.tasks", "--output", output / "data"]
    pretrain = [own_file("pretrain/main.py"), output / "data/images", "--resume", "auto"]
    pretrain += ["--recipe", own_file(QUICK_RECIPE), "--output", output / "pretrain"]
    jobs = [script_job(_quick_folder("draw", output / "data"), draw, seconds=10)]
    if pretraining:
        folder = _quick_folder("pretrain", output / "pretrain")
        jobs.append(script_job(folder, [*pretrain, "--seed", 0], seconds=60))
    run_in_order(jobs)


def _quick_folder(name: str, path: Path) -> JobFolder:
    """The first version left a file NAME.done beside the folder."""
    done = path.parent / f"{name}.done"
    return JobFolder(name, path, lambda: {"state": FINISHED} if done.exists() else {})
