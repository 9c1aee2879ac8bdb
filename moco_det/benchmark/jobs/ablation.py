"""A grid of pretraining runs as data, each evaluated by weighted kNN and the linear protocol.

An ablation is a YAML file with these keys, all but one of `grid` and `rows` optional:
    recipe      another YAML with flags of main.py, relative to this one
    base        flags of main.py that all rows share; they win over the recipe's
    grid        {flag: [values]}: a row for each combination
    rows        [{flag: value}]: a row each
    untrained   true: a first row for the encoder as it is initialised
    seeds       number of runs of each row, seeded 0, 1, ...
    knn         flags of knn.py
    linear      flags of linear.py
A run is three commands, which anyone could type: main.py, knn.py, linear.py.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.job import (
    FINISHED,
    INTERRUPTED,
    TO_DO,
    UNREADABLE,
    Command,
    Job,
    JobFolder,
    unfinished,
)
from moco_det.benchmark.jobs.runner import JobFailed, ScreenEta, run_on_screen
from moco_det.common.documents import (
    read_json,
    read_json_lines,
    read_mapping,
    shown,
)
from moco_det.common.errors import UserError, nearest, one_line
from moco_det.common.installation import own_file
from pretrain.engine.checkpoints import LAST
from pretrain.evaluation.features import RANDOM
from pretrain.flags.common import as_flags
from pretrain.flags.evaluation import knn_parser, linear_parser, parse_knn, parse_linear
from pretrain.flags.pretraining import parse_pretraining, pretraining_parser

FOLDER = own_file("pretrain")
KEYS = ("recipe", "base", "grid", "rows", "untrained", "seeds", "knn", "linear")
UNTRAINED = "untrained"
MOST = 1000  # rows, and seeds of each
# Arguments of main.py that no number depends on, and the data, which is an entry of its own.
NO_SETTINGS = (
    "data", "recipe", "output", "resume", "overwrite", "workers", "save_every", "save_steps",
    "keep",
    "world_size", "rank", "dist_url", "dist_backend", "gpu", "multiprocessing_distributed",
)  # fmt: skip
EXPECTED = {"pretrain": 120, "knn": 15, "linear": 20}  # seconds; the first guess of an ETA


@dataclass(frozen=True)
class Variant:
    """A row of the table: trials that differ in the seed alone.

    `name`: the varied flags as typed; "(base)" where there are none.
    """

    name: str
    flags: list[str]

    @property
    def trained(self) -> bool:
        return self.name != UNTRAINED


@dataclass(frozen=True)
class Ablation:
    """The content of an ablation file. `knn`, `linear`: flags of the evaluations."""

    rows: list[Variant]
    seeds: int
    knn: list[str]
    linear: list[str]


def read_ablation(path: Path) -> Ablation:
    """Raises UserError for what is no ablation, naming the key and the nearest known one."""
    content = read_mapping(path, "ablation")
    for key in content:
        if key not in KEYS:
            name = one_line(key, 60)
            raise UserError(f"unknown key '{name}' in {path}{nearest(name, KEYS)}")
    base = _flags(content, "base", path, pretraining_parser())
    if "recipe" in content:
        base = ["--recipe", os.path.realpath(path.parent / str(content["recipe"])), *base]
    rows = [Variant(UNTRAINED, base)] if content.get("untrained") else []
    for values in _variants(content, path):
        varied = as_flags(values, pretraining_parser(), str(path))
        rows.append(Variant(" ".join(varied) or "(base)", base + varied))
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} has two rows '{name}'")
    seeds = content.get("seeds", 3)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 1 <= seeds <= MOST:
        raise UserError(
            f"'seeds' in {path} must be a number of at least 1, not {shown(seeds)} (and of at "
            f"most {MOST})"
        )
    knn = _flags(content, "knn", path, knn_parser())
    return Ablation(rows, seeds, knn, _flags(content, "linear", path, linear_parser()))


def _flags(content: dict, key: str, path: Path, parser: argparse.ArgumentParser) -> list[str]:
    return as_flags(_mapping(content, key, path), parser, f"'{key}' of {path}")


def _mapping(content: dict, key: str, path: Path) -> dict:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"'{key}' of {path} must map flags to values")
    return value


def _variants(content: dict, path: Path) -> list[dict]:
    """The varied flags of each row."""
    if ("grid" in content) == ("rows" in content):
        raise UserError(
            f"{path} needs one of 'grid' ({{flag: [values]}}) and 'rows' ([{{flag: value}}])"
        )
    if "rows" in content:
        rows = content["rows"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"'rows' of {path} must be a list of {{flag: value}}")
        _check_count(len(rows), path)
        return rows
    grid = _mapping(content, "grid", path)
    for flag, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"'{flag}' in 'grid' of {path} must be a list of values")
    _check_count(math.prod(map(len, grid.values())), path)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _check_count(rows: int, path: Path) -> None:
    if rows > MOST:
        raise UserError(f"{path} makes {rows:,} rows; at most {MOST} are run")


# -- trials ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One row of the table with one seed. Raises UserError for flags that do not do.

    Args:
        folder: of its own.
        source: the ablation file, for messages.
        data: ImageFolder root with train/CLASS and val/CLASS.
        workers: data loading processes; None: the commands' default.
        launch: what starts each of the commands.
    """

    variant: Variant
    seed: int
    folder: Path
    ablation: Ablation
    source: Path
    data: Path
    workers: int | None = None
    launch: Sequence[str] = (sys.executable,)

    @property
    def row(self) -> str:
        return self.variant.name

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @functools.cached_property
    def job(self) -> Job:
        return Job(
            JobFolder(self.name, self.folder, lambda: earlier_record(self.folder)),
            [
                Command(name, [*self.launch, *words], EXPECTED.get(name))
                for name, words in self.commands().items()
            ],
            identity=self.settings(),
            read_result=lambda: {"measures": self.measures()},
        )

    def result(self) -> dict[str, Any] | None:
        """{measures, seconds} of a finished trial, else None."""
        record = self.job.folder.look().record
        if record.get("state") != FINISHED:
            return None
        return {"measures": record["measures"], "seconds": record["seconds"]}

    def commands(self) -> dict[str, list[str]]:
        """Name of each command -> script and arguments, in the order to run them in."""
        common = ["--seed", str(self.seed)]
        common += ["--workers", str(self.workers)] if self.workers is not None else []
        pretrain = [*self.variant.flags, *common, "--output", str(self.folder), "--resume", "auto"]
        args = self._accepted(parse_pretraining, pretrain)
        checkpoint = str(self.folder / LAST) if self.variant.trained else RANDOM
        common += ["--pretrained", checkpoint, "--arch", args.arch]
        common += ["--image-size", str(args.image_size)]
        common += ["--small-stem"] if args.small_stem else []
        neighbours = [*common, *self.ablation.knn, "--output", str(self.folder / "knn.json")]
        probe = [*common, *self.ablation.linear, "--output", str(self.folder / "linear")]
        probe += ["--resume", "auto"]
        self._accepted(parse_knn, neighbours)
        self._accepted(parse_linear, probe)
        data, commands = str(self.data), {}
        if self.variant.trained:
            commands["pretrain"] = [str(FOLDER / "main.py"), data, *pretrain]
        commands["knn"] = [str(FOLDER / "knn.py"), data, *neighbours]
        commands["linear"] = [str(FOLDER / "linear.py"), data, *probe]
        return commands

    def settings(self) -> dict:
        """What the numbers depend on: the flags that are not at their defaults.

        Where from and how a run is launched is not among it, nor is what it keeps on disk.
        """
        given = [*self.variant.flags, "--seed", str(self.seed)]
        args, parser = self._accepted(parse_pretraining, given), pretraining_parser()
        return {
            "pretrain": {
                key: value
                for key, value in vars(args).items()
                if value != parser.get_default(key) and key not in NO_SETTINGS
            },
            "trained": self.variant.trained,
            "data": str(self.data),
            "knn": self.ablation.knn,
            "linear": self.ablation.linear,
        }

    def measures(self) -> dict[str, float]:
        """What the commands left: name -> value; accuracies in percent.

        Loss and accuracy of the pretext task are means over the last `--print-freq` steps. The
        linear classifier's accuracy is that of its last epoch, not of its best.
        """
        values = {}
        if self.variant.trained:
            last = _last(self.folder / "metrics.jsonl", "loss", "acc1")
            values |= {"pretext loss": last["loss"], "pretext top-1": last["acc1"]}
        knn = read_json(self.folder / "knn.json", "the result")
        if not isinstance(knn, dict) or "knn_top1" not in knn:
            raise UserError(f"{self.folder / 'knn.json'} holds no knn_top1")
        probe = _last(self.folder / "linear" / "metrics.jsonl", "val_acc1")
        return values | {"kNN top-1": knn["knn_top1"], "linear top-1": probe["val_acc1"]}

    def _accepted(self, parse: Callable, words: list[str]) -> argparse.Namespace:
        return accepted(parse, [str(self.data), *words], f"row '{self.row}' of {self.source}")


def accepted(parse: Callable, words: list[str], where: str) -> argparse.Namespace:
    """Flags as the command's own `parse` reads them. Raises UserError with its complaint, which
    names `where` they stand."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return parse(words)
    except UserError as error:
        reason = str(error)
    except SystemExit:  # of argparse, which prints its reason last
        last = (printed.getvalue().strip().splitlines() or [""])[-1]
        reason = re.sub(r"^.*?error: ", "", last)
    raise UserError(f"{where}: {reason}")


def _last(path: Path, *names: str) -> dict:
    """The last entry of a metrics.jsonl that holds `names`. Raises UserError for none."""
    lines = read_json_lines(path, "the log", finite=False)
    found = [line for line in lines if all(name in line for name in names)]
    if not found:
        raise UserError(f"{path} holds no {' and '.join(names)}")
    return found[-1]


def earlier_record(folder: Path) -> dict[str, Any]:
    """From the files of the first version: trial.json {settings, commands}, written before the
    commands ran, and result.json {measures, seconds}, written once all of them were done."""
    begun, done = folder / "trial.json", folder / "result.json"
    if not begun.exists():
        return {}
    record = {"state": INTERRUPTED, "identity": read_json(begun, "the trial")["settings"]}
    return record | ({"state": FINISHED} | read_json(done, "the result") if done.exists() else {})


def plan_trials(
    ablation: Ablation,
    seeds: int | None,
    output: Path,
    processes: int = 1,
    **fields: Any,
) -> list[Trial]:
    """All trials, a seed of every row after another: a table cut short has all its rows.

    Args:
        seeds: in place of the file's.
        processes: of each command; more than one are started by torchrun.
        fields: source, data and workers of `Trial`.

    Raises:
        UserError: what cannot be run, or a folder that holds another trial, before anything is run.
    """
    if seeds is not None and not 1 <= seeds <= MOST:
        raise UserError(f"--seeds must be at least 1 and at most {MOST}")
    data = fields["data"]
    if not (data / "train").is_dir() or not (data / "val").is_dir():
        raise UserError(f"--data {data} needs train/CLASS and val/CLASS: both are read")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launch.append(str(processes))
    fields |= {"ablation": ablation, "launch": launch, "data": data.resolve()}
    trials = []
    for seed in range(seeds or ablation.seeds):
        for variant in ablation.rows:
            folder = output / re.sub(r"[^\w.]+", "_", variant.name).strip("_") / f"seed{seed}"
            trials.append(Trial(variant, seed, folder, **fields))
            if not trials[-1].job.folder.look().problem:  # such a trial is listed; none is run
                trials[-1].job.check_identity()
    return trials


def listing(trials: Sequence[Trial]) -> str:
    """The state and the commands of each."""
    lines = []
    for trial in trials:
        found = trial.job.folder.look()
        words = {FINISHED: "done", TO_DO: TO_DO, UNREADABLE: UNREADABLE}
        lines.append(f"{words.get(found.state, 'begun'):5s}  {trial.name}")
        lines += [f"         {found.problem}"] if found.problem else []
        lines += [f"         {command.as_typed()}" for command in trial.job.commands]
    return "\n".join(lines)


def run_trials(trials: Sequence[Trial]) -> dict[str, str]:
    """Run what is not done; returns the reasons of those that failed, by the trials' names."""
    todo = unfinished([trial.job for trial in trials])
    failures, eta = {}, ScreenEta(todo)
    print(f"{len(trials) - len(todo)} of {len(trials)} trials are done", flush=True)
    for number, job in enumerate(todo, 1):
        print(f"== trial {number} of {len(todo)}: {job.name}", flush=True)
        try:
            run_on_screen(job, eta)
        except JobFailed as failure:
            failures[job.name] = f"{job.folder.log_end()[-1]} ({failure})"
            print(f"== failed: {job.name}: {failure}", flush=True)
    return failures
