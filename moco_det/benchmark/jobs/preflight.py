"""What would keep the runs of a reproduction from a good end, asked before the first is begun.

Thousands of GPU hours are not the place to find, run after run, that a data set is missing. All
runs that are still to be done are looked at, and what they have in common is looked at once.
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from moco_det.benchmark.jobs.grid import Run
from moco_det.benchmark.jobs.job import FINISHED
from moco_det.benchmark.jobs.runner import gpu_slots
from moco_det.benchmark.jobs.runs import Settings
from moco_det.common.errors import UserError
from moco_det.config.batch_plan import plan_batch
from moco_det.config.checks import (
    check_datasets,
    check_input,
    check_metric_files,
    check_weights,
    num_classes,
)
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights.files import read_state_dict

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
