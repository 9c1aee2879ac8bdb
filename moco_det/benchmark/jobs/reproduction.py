"""Checkpoints in, tables out: what tools/reproduce.py does.

OUTPUT/weights/, OUTPUT/runs/      see `runs`
OUTPUT/report.{html,md,csv,json}
OUTPUT/data/, OUTPUT/pretrain/     of the toy reproduction: drawn images, and the checkpoint that
                                   a minute of MoCo on them makes
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate

from moco_det.benchmark.jobs import slurm
from moco_det.benchmark.jobs.grid import FOLDER, Grid, Run, Table, load_grid
from moco_det.benchmark.jobs.job import FINISHED, Job, JobFolder, script_job, unfinished
from moco_det.benchmark.jobs.runner import gpu_slots, run_in_order, run_side_by_side
from moco_det.benchmark.jobs.runs import Settings, convert, weight_file
from moco_det.benchmark.report import reproduction as report
from moco_det.benchmark.report.pages import sample_pictures
from moco_det.common.errors import UserError
from moco_det.config.checks import (
    check_datasets,
    check_input,
    check_metric_files,
    check_weights,
    num_classes,
    plan_batch,
)
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights.files import read_state_dict

QUICK_RECIPE = "configs/pretrain/reproduce_quick_r50.yaml"
QUICK_ROW = "moco"  # of quick.yaml


@dataclass(frozen=True)
class Reproduction:
    """What to run. `checkpoints`: row -> file; `trials`: their numbers, None for the paper's."""

    grid: Grid
    tables: Sequence[Table]
    checkpoints: Mapping[str, Path]
    trials: Sequence[int] | None
    options: Sequence[str]
    settings: Settings

    def runs(self) -> list[Run]:
        """Raises UserError for a config that does not exist."""
        output, configs = self.settings.output, self.settings.repository / "configs"
        files = {name: weight_file(name, at, output) for name, at in self.checkpoints.items()}
        runs = self.grid.runs(self.tables, files, self.trials, configs, self.options)
        missing = {run.config_file for run in runs if not run.config_file.is_file()}
        if missing:
            names = ", ".join(sorted(map(str, missing)))
            raise UserError(f"no such config: {names}; choose other --tables")
        return runs


def estimated_hours(run: Run) -> float | None:
    """GPU hours; None where the model zoo has no speed of such a configuration."""
    hours = run.experiment.gpu_hours
    if hours is None:
        return None
    given = dict(zip(run.options[::2], run.options[1::2], strict=True))
    iterations = int(given.get("SOLVER.MAX_ITER", run.experiment.iterations))
    batch = int(given.get("SOLVER.IMS_PER_BATCH", run.experiment.batch))
    return hours * iterations * batch / (run.experiment.iterations * run.experiment.batch)


def problems(plan: Reproduction, local: bool, toy: bool, ahead: bool = False) -> list[str]:
    """What keeps the plan's runs from a good end; see `preflight`."""
    settings = plan.settings
    files = {name: weight_file(name, at, settings.output) for name, at in plan.checkpoints.items()}
    made = {str(file) for name, file in files.items() if file != plan.checkpoints[name]}
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
    return (
        f"{table}\n\n{len(runs)} runs to do: {total:.0f} GPU hours{more}. Estimates for V100s, "
        "from the training speeds of Detectron2's model zoo; evaluation is not counted."
    )


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


def _to_do(plan: Reproduction) -> list[Run]:
    """Convert the checkpoints; the runs that are not finished."""
    runs, settings = plan.runs(), plan.settings
    convert(plan.checkpoints, settings.output, settings.repository)
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


def prepare_quick(repository: Path, output: Path, pretraining: bool) -> None:
    """Draw the images and, if `pretraining` is wanted, pretrain on them, each unless it is done.

    Raises:
        UserError: one of the two failed.
    """
    draw = ["-m", "moco_det.benchmark.synthetic.tasks", "--output", output / "data"]
    pretrain = [repository / "pretrain/main.py", output / "data/images", "--resume", "auto"]
    pretrain += ["--recipe", repository / QUICK_RECIPE, "--output", output / "pretrain"]
    jobs = [script_job(_quick_folder("draw", output / "data"), draw, seconds=10)]
    if pretraining:
        folder = _quick_folder("pretrain", output / "pretrain")
        jobs.append(script_job(folder, [*pretrain, "--seed", 0], seconds=60))
    run_in_order(jobs)


def _quick_folder(name: str, path: Path) -> JobFolder:
    """The first version left a file NAME.done beside the folder."""
    done = path.parent / f"{name}.done"
    return JobFolder(name, path, lambda: {"state": FINISHED} if done.exists() else {})


# -- what would keep runs from a good end, asked before the first is begun -------------------------
#
# Thousands of GPU hours are not the place to find, run after run, that a data set is missing. All
# runs that are still to be done are looked at, and what they have in common is looked at once.

BYTES_OF_A_PARAMETER = 8  # its float32 value, and the optimizer's momentum

Configs = Mapping[str, CfgNode]  # name of a run -> its config


class Problems:
    """Messages, each once, with the runs that they are about."""

    def __init__(self):
        self._runs: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, *runs: str) -> Iterator[None]:
        """A `UserError` from within is a problem of these runs; it ends here."""
        try:
            yield
        except UserError as error:
            self._runs.setdefault(str(error), []).extend(runs)

    def lines(self) -> list[str]:
        found = []
        for text, names in self._runs.items():
            first = list(dict.fromkeys(names))
            more = f" and {len(first) - 1} more" if len(first) > 1 else ""
            found.append(f"{text} ({first[0]}{more})" if first else text)
        return found


def preflight(
    runs: Sequence[Run],
    settings: Settings,
    made: Collection[str] = (),
    local: bool = True,
    toy: bool = False,
    ahead: bool = False,
) -> list[str]:
    """A line for each problem; none where all runs can begin.

    Args:
        made: weight files that will be made before the runs.
        local: the runs are this machine's, so that it needs their GPUs.
        toy: the runs are made for CPUs.
        ahead: nothing is downloaded, and a toy's data may not be drawn yet.
    """
    problems, configs = Problems(), {}
    for run in runs:
        found = settings.folder(run).look()
        with problems.of(run.name):
            if found.problem:
                raise UserError(found.problem)
            if found.record:
                _check_identity(run, settings, made)
            if found.state != FINISHED:
                configs[run.name] = _config(run, settings, local)
    todo = [run for run in runs if run.name in configs]
    if not (toy and ahead):
        _check_data(configs, problems)
    _check_weights(todo, configs, made, ahead, problems)
    if local:
        _check_gpus(configs, settings, toy, problems)
    _check_disk(todo, configs, settings, problems)
    return problems.lines()


def _check_identity(run: Run, settings: Settings, made: Collection[str]) -> None:
    """See `Job.check_identity`; weights are known by what is in their file, once there is one."""
    missing = [word for word in run.options if word in made and not Path(word).is_file()]
    if not missing:
        settings.job(run).check_identity()


def _config(run: Run, settings: Settings, local: bool) -> CfgNode:
    native = settings.engine == "native"
    cfg = load_config(str(run.config_file), run.options, any_value=not native)
    check_input(cfg, crops_objects=not native)
    if local and not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        plan_batch(cfg, settings.gpus)
    return cfg


def _check_data(configs: Configs, problems: Problems) -> None:
    absent = set()
    for run, cfg in configs.items():
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        for name in names:
            with problems.of(run):
                absent.add(name)
                get_dataset(name)
                absent.discard(name)
    checked = set()
    for run, cfg in configs.items():
        names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        if absent.isdisjoint(names) and (key := (*names, num_classes(cfg))) not in checked:
            checked.add(key)
            with problems.of(run):
                check_datasets(cfg)
                check_metric_files(cfg)


def _check_weights(
    runs: Sequence[Run], configs: Configs, made: Collection[str], ahead: bool, problems: Problems
) -> None:
    read: dict[str, Mapping[str, object]] = {}  # file -> its entries beside the arrays
    failed: dict[str, UserError] = {}
    for run in runs:
        path = configs[run.name].MODEL.WEIGHTS
        if not path or path in made or (ahead and "://" in path):
            continue
        with problems.of(run.name):
            if path in failed:
                raise failed[path]
            try:
                read[path] = read.get(path) or read_state_dict(path)[1]
            except UserError as error:
                failed[path] = error
                raise
            check_weights(configs[run.name], read[path])


def _check_gpus(configs: Configs, settings: Settings, toy: bool, problems: Problems) -> None:
    with problems.of():
        gpu_slots(settings.gpus, None)
    asking = [run for run, cfg in configs.items() if cfg.MODEL.DEVICE.startswith("cuda")]
    if asking and not toy and not torch.cuda.is_available():
        with problems.of(*asking):
            raise UserError(
                "no CUDA device, and MODEL.DEVICE is cuda: a run of the papers takes weeks on a "
                "CPU; if that is what you want, --opts MODEL.DEVICE cpu"
            )


def _check_disk(
    runs: Sequence[Run], configs: Configs, settings: Settings, problems: Problems
) -> None:
    sizes: dict[tuple, int] = {}
    needed = 0
    for run in runs:
        cfg, folder = configs[run.name], settings.folder(run).path
        key = (run.experiment.name, run.config_file.name)
        if key not in sizes:
            sizes[key] = checkpoint_bytes(cfg)
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        count = 1 + (cfg.SOLVER.MAX_ITER // period if period > 0 else 0)
        there = sum(path.stat().st_size for path in folder.glob("*.pth"))
        needed += max(0, count * sizes[key] - there)
    free = shutil.disk_usage(_existing(settings.output)).free
    if needed > free:
        with problems.of():
            raise UserError(
                f"the checkpoints of {len(runs)} runs take about {needed / 1e9:,.1f} GB, and "
                f"{settings.output} has {free / 1e9:,.1f} GB left: name another --output, or keep "
                "fewer (--opts SOLVER.CHECKPOINT_PERIOD N)"
            )


def checkpoint_bytes(cfg: CfgNode) -> int:
    """About the size of one of a run's checkpoints; nothing is allocated to find it."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except UserError:  # only Detectron2 has such a model
        return 0
    return BYTES_OF_A_PARAMETER * sum(parameter.numel() for parameter in model.parameters())


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
