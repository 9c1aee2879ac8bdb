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
import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moco_det.common.errors import UserError
from pretrain import knn, linear, main
from pretrain.engine import checkpoints
from pretrain.evaluation.features import RANDOM

FOLDER = Path(__file__).resolve().parents[3] / "pretrain"
KEYS = ("recipe", "base", "grid", "rows", "untrained", "seeds", "knn", "linear")
UNTRAINED = "untrained"
# Flags of main.py that no number depends on.
NO_SETTINGS = (
    "recipe", "output", "resume", "workers", "save_every", "save_steps", "keep",
    "world_size", "rank", "dist_url", "dist_backend", "gpu", "multiprocessing_distributed",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone. `name`: the varied flags as typed; "(base)" if none."""

    name: str
    flags: list[str]

    @property
    def trained(self) -> bool:
        return self.name != UNTRAINED


@dataclass(frozen=True)
class Ablation:
    """The content of an ablation file. `knn`, `linear`: flags of the evaluations."""

    rows: list[Row]
    seeds: int
    knn: list[str]
    linear: list[str]


def read_ablation(path: Path) -> Ablation:
    """Raises UserError for what is no ablation, naming the key and the nearest known one."""
    content = main.read_yaml(path, "ablation")
    for key in content:
        if key not in KEYS:
            raise UserError(f"unknown key '{key}' in {path}{main.nearest(str(key), KEYS)}")
    base = _base_flags(content, path)
    rows = [Row(UNTRAINED, base)] if content.get("untrained") else []
    for varied in _variants(content, path):
        flags = main.as_flags(varied, main.build_parser(), str(path))
        rows.append(Row(" ".join(flags) or "(base)", base + flags))
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} has two rows '{twice}'")
    seeds = content.get("seeds", 3)
    if not isinstance(seeds, int) or seeds < 1:
        raise UserError(f"'seeds' in {path} must be a number of at least 1, not {seeds!r}")
    knn_flags, linear_flags = (
        main.as_flags(_mapping(content, key, path), parser, f"'{key}' of {path}")
        for key, parser in (("knn", knn.build_parser()), ("linear", linear.build_parser()))
    )
    return Ablation(rows, seeds, knn_flags, linear_flags)


def _base_flags(content: dict, path: Path) -> list[str]:
    flags = main.as_flags(_mapping(content, "base", path), main.build_parser(), f"'base' of {path}")
    if "recipe" in content:
        return ["--recipe", str((path.parent / str(content["recipe"])).resolve()), *flags]
    return flags


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
        return rows
    grid = _mapping(content, "grid", path)
    for flag, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"'{flag}' in 'grid' of {path} must be a list of values")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


@dataclass(frozen=True)
class Run:
    """One row with one seed, in a folder of its own. Raises UserError for flags that do not do.

    Args:
        source: the ablation file, for messages.
        data: ImageFolder root.
        workers: data loading processes; None: the commands' default.
    """

    row: Row
    seed: int
    folder: Path
    ablation: Ablation
    source: Path
    data: Path
    workers: int | None = None

    def commands(self) -> dict[str, list[str]]:
        """Name of each command -> script and arguments, in the order to run them in."""
        common = ["--seed", str(self.seed)]
        common += ["--workers", str(self.workers)] if self.workers is not None else []
        pretrain = [*self.row.flags, *common, "--output", str(self.folder), "--resume", "auto"]
        args = self._accepted(main.parse, pretrain)
        checkpoint = str(self.folder / checkpoints.LAST) if self.row.trained else RANDOM
        common += ["--pretrained", checkpoint, "--arch", args.arch]
        common += ["--image-size", str(args.image_size)]
        common += ["--small-stem"] if args.small_stem else []
        neighbours = [*common, *self.ablation.knn, "--output", str(self.folder / "knn.json")]
        probe = [*common, *self.ablation.linear, "--output", str(self.folder / "linear")]
        probe += ["--resume", "auto"]
        self._accepted(knn.parse, neighbours)
        self._accepted(linear.parse, probe)
        commands = {"pretrain": ("main.py", pretrain)} if self.row.trained else {}
        commands |= {"knn": ("knn.py", neighbours), "linear": ("linear.py", probe)}
        return {
            name: [str(FOLDER / script), str(self.data), *flags]
            for name, (script, flags) in commands.items()
        }

    def settings(self) -> dict:
        """What the numbers depend on: the flags that are not at their defaults.

        Where from and how a run is launched is not among it, nor is what it keeps on disk.
        """
        args = vars(self._accepted(main.parse, [*self.row.flags, "--seed", str(self.seed)]))
        parser = main.build_parser()
        changed = {k: v for k, v in args.items() if v != parser.get_default(k)}
        return {
            "pretrain": {k: v for k, v in changed.items() if k not in ("data", *NO_SETTINGS)},
            "trained": self.row.trained,
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
        if self.row.trained:
            last = _records(self.folder / "metrics.jsonl", "loss")[-1]
            values |= {"pretext loss": last["loss"], "pretext top-1": last["acc1"]}
        values["kNN top-1"] = json.loads((self.folder / "knn.json").read_text())["knn_top1"]
        linear_log = _records(self.folder / "linear" / "metrics.jsonl", "val_acc1")
        return values | {"linear top-1": linear_log[-1]["val_acc1"]}

    def _accepted(self, parse: Callable, flags: list[str]) -> argparse.Namespace:
        """The flags as the command's parser reads them; its complaint names the ablation file."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return parse([str(self.data), *flags])
        except SystemExit as error:
            last = (said.getvalue().strip().splitlines() or [""])[-1]
            reason = re.sub(r"^.*?error: ", "", error.code if isinstance(error.code, str) else last)
            raise UserError(f"row '{self.row.name}' of {self.source}: {reason}") from None


def _records(path: Path, name: str) -> list[dict]:
    """The entries of a metrics.jsonl that hold `name`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if name in line]
