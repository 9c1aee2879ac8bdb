"""What would keep runs from a good end, asked before the first is begun.

Thousands of GPU hours are not the place to find, run after run, that a data set is missing. All
runs that are still to be done are looked at, and what they have in common is looked at once.
"""

import contextlib
import shutil
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from moco_det.benchmark.jobs.encoder_runs import data_folder, parsed
from moco_det.benchmark.jobs.frozen import check_data
from moco_det.benchmark.jobs.grid import AnyRun, ClassifierRun, EncoderRun, FrozenRun, Run
from moco_det.benchmark.jobs.job import FINISHED
from moco_det.benchmark.jobs.runner import gpu_slots
from moco_det.benchmark.jobs.runs import Settings
from moco_det.common.errors import UserError
from moco_det.common.weight_sources import is_remote
from moco_det.config.checks import (
    check_datasets,
    check_input,
    check_metric_files,
    check_solver,
    check_weights,
    num_classes,
    plan_batch,
)
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset
from moco_det.native.modeling.meta_arch import build_model
from moco_det.weights.resnet import detectron2_weights
from pretrain.data.benchmarks import find_dataset
from pretrain.evaluation.features import SUPERVISED, load_encoder
from pretrain.moco.encoders import build_encoder

BYTES_OF_A_PARAMETER = 8  # its float32 value, and the optimizer's momentum

Configs = Mapping[str, CfgNode]  # name of a detector's run -> its config
Flags = Mapping[str, Namespace]  # name of an encoder's run -> its flags


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


class Once:
    """A function that is asked each question once; a `UserError` is an answer too."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._answers: dict[tuple, Any] = {}

    def __call__(self, *question) -> Any:
        if question not in self._answers:
            try:
                self._answers[question] = self._function(*question)
            except UserError as error:
                self._answers[question] = error
        if isinstance(self._answers[question], UserError):
            raise self._answers[question]
        return self._answers[question]


def preflight(
    runs: Sequence[AnyRun],
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
    problems, configs, flags = Problems(), {}, {}
    for run in runs:
        found = settings.folder(run).look()
        with problems.of(run.name):
            if found.problem:
                raise UserError(found.problem)
            if found.record:
                _check_identity(run, settings, made)
            if found.state == FINISHED:
                continue
            if isinstance(run, EncoderRun):
                flags[run.name] = parsed(run)
            else:
                configs[run.name] = _config(run, settings, local)
    detectors = [run for run in runs if run.name in configs]
    encoders = [run for run in runs if run.name in flags]
    classifiers = [run for run in encoders if isinstance(run, ClassifierRun)]
    if not (toy and ahead):
        _check_data(configs, problems)
        _check_labelled(classifiers, flags, settings, problems)
        _check_frozen([run for run in encoders if isinstance(run, FrozenRun)], problems)
    _check_weights(detectors, configs, made, ahead, problems)
    _check_encoders(encoders, flags, made, ahead, problems)
    if local:
        asking = [run for run, cfg in configs.items() if cfg.MODEL.DEVICE.startswith("cuda")]
        asking += [run.name for run in encoders if not run.cpu]
        _check_gpus(asking, settings, toy, problems)
    needed = _detector_bytes(detectors, configs, settings)
    needed += _classifier_bytes(classifiers, flags, settings)
    _check_disk(len(configs) + len(flags), needed, settings, problems)
    return problems.lines()


def _check_identity(run: AnyRun, settings: Settings, made: Collection[str]) -> None:
    """See `Job.check_identity`; weights are known by what is in their file, once there is one."""
    given = [run.flags["pretrained"]] if isinstance(run, EncoderRun) else run.options
    if not [word for word in given if word in made and not Path(word).is_file()]:
        settings.job(run).check_identity()


def _config(run: Run, settings: Settings, local: bool) -> CfgNode:
    native = settings.engine == "native"
    cfg = load_config(str(run.config_file), run.options, any_value=not native)
    check_input(cfg, crops_objects=not native)
    check_solver(cfg)
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
    entries = Once(lambda path: detectron2_weights(path)[1])  # those beside the arrays
    for run in runs:
        path = configs[run.name].MODEL.WEIGHTS
        if path and path not in made and not (ahead and is_remote(path)):
            with problems.of(run.name):
                check_weights(configs[run.name], entries(path))


def _check_labelled(
    runs: Sequence[ClassifierRun], flags: Flags, settings: Settings, problems: Problems
) -> None:
    """The data sets of classifiers, and that they fill a batch that the processes can share."""
    training_images = Once(_training_images)
    for run in runs:
        batch, dataset = flags[run.name].batch_size, flags[run.name].dataset
        with problems.of(run.name):
            images = training_images(data_folder(run), dataset)
            if images < batch or batch % settings.gpus:
                raise UserError(
                    f"batch_size {batch} must be a multiple of --gpus-per-run {settings.gpus} and "
                    f"at most the {images} images of {data_folder(run)}: --linear batch_size=N"
                )


def _training_images(data: Path, dataset: str) -> int:
    try:
        _, train, _ = find_dataset(dataset, data)
    except UserError as error:
        raise UserError(
            f"{error}; link the data set as {data}, or set DETECTRON2_DATASETS to the folder that "
            f"holds {data.name}/"
        ) from error
    return len(train.labels)


def _check_frozen(runs: Sequence[FrozenRun], problems: Problems) -> None:
    """The data sets of frozen evaluations."""
    one_of = {run.experiment.name: run for run in runs}
    checked = Once(lambda experiment: check_data(one_of[experiment]))
    for run in runs:
        with problems.of(run.name):
            checked(run.experiment.name)


def _check_encoders(
    runs: Sequence[EncoderRun],
    flags: Flags,
    made: Collection[str],
    ahead: bool,
    problems: Problems,
) -> None:
    """That each checkpoint holds an encoder of its row's architecture."""
    fits = Once(_check_encoder)
    for run in runs:
        args = flags[run.name]
        if args.pretrained not in made and not (ahead and args.pretrained == SUPERVISED):
            with problems.of(run.name):
                fits(args.pretrained, args.arch, args.small_stem)


def _check_encoder(pretrained: str, arch: str, small_stem: bool) -> None:
    load_encoder(pretrained, arch, 1, small_stem)


def _check_gpus(asking: Sequence[str], settings: Settings, toy: bool, problems: Problems) -> None:
    with problems.of():
        gpu_slots(settings.gpus, None)
    if asking and not toy and not torch.cuda.is_available():
        with problems.of(*asking):
            raise UserError(
                "no CUDA device, and MODEL.DEVICE is cuda: a run of the papers takes weeks on a "
                "CPU; if that is what you want, --opts MODEL.DEVICE cpu"
            )


def _detector_bytes(runs: Sequence[Run], configs: Configs, settings: Settings) -> int:
    """What the checkpoints of detectors are still to take."""
    sizes: dict[tuple, int] = {}
    needed = 0
    for run in runs:
        cfg, folder = configs[run.name], settings.folder(run).path
        key = (run.experiment.name, run.config_file.name)
        if key not in sizes:
            sizes[key] = checkpoint_bytes(cfg)
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        count = 1 + (cfg.SOLVER.MAX_ITER // period if period > 0 else 0)
        needed += max(0, count * sizes[key] - _bytes_of(folder.glob("*.pth")))
    return needed


def _classifier_bytes(runs: Sequence[ClassifierRun], flags: Flags, settings: Settings) -> int:
    """What the last and the best checkpoint of classifiers are still to take."""
    needed = 0
    for run in runs:
        args, folder = flags[run.name], settings.folder(run).path
        with contextlib.suppress(UserError), torch.device("meta"):  # another check names it
            parameters = build_encoder(args.arch, 1000).parameters()
            one = BYTES_OF_A_PARAMETER * sum(p.numel() for p in parameters)
            one = one if args.finetune else one // 2  # a frozen encoder has no momentum
            needed += max(0, 2 * one - _bytes_of(folder.glob("checkpoint_*.pth.tar")))
    return needed


def _bytes_of(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _check_disk(runs: int, needed: int, settings: Settings, problems: Problems) -> None:
    free = shutil.disk_usage(_existing(settings.output)).free
    if needed > free:
        with problems.of():
            raise UserError(
                f"the checkpoints of {runs} runs take about {needed / 1e9:,.1f} GB, and "
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
