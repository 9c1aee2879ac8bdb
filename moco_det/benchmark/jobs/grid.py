"""What is run: experiment x initialisation x trial, from a YAML such as paper.yaml.

A row of a table is an initialisation. Some rows have a config of their own (random, supervised);
the others are checkpoints that the user names, `moco_in1m=CKPT`, and run the `_moco` config with
them. A name that the grid lacks is a row of the user's own, in every table.

An experiment trains detectors, by tools/train_net.py, or classifiers, by pretrain/linear.py, or
evaluates frozen features, by another command of pretrain/.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moco_det.benchmark.significance import KnownDeviation
from moco_det.common.documents import read_mapping
from moco_det.common.errors import UserError

FOLDER = Path(__file__).parent
DEFAULT_ROW = "moco_in1m"  # what a checkpoint without a name is held against


@dataclass(frozen=True)
class Row:
    """An initialisation. `config`: ending of its config file; `weights`: its MODEL.WEIGHTS, None
    where the config says it; neither: a checkpoint that the user gives.

    `arch`: that checkpoint's encoder; `pretrain`: flags of pretrain/main.py that make it of
    `images`, which stands for their folder.
    """

    name: str
    label: str
    config: str | None = None
    weights: str | None = None
    arch: str = "resnet50"
    pretrain: str | None = None
    images: str = "IMAGENET"


@dataclass(frozen=True)
class Experiment:
    """A detector, a data set and a schedule.

    `iterations`, `batch` (images per step) and `trials` are the paper's. `file`: its one config,
    for all rows; None: configs/CONFIGS_ROW.yaml, or configs/NAME_ROW.yaml.
    `seconds_per_iteration` on 8 GPUs, as `measured` says. `options`: config keys and values for
    every run. `classes`: names to write on pictures, where the data set's own do not apply.
    """

    name: str
    title: str
    iterations: int
    batch: int
    trials: int
    file: str | None = None
    configs: str | None = None
    seconds_per_iteration: float | None = None
    measured: str | None = None
    trial_sd: Mapping[str, KnownDeviation] | None = None
    options: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def config_file(self, configs: Path, ending: str) -> Path:
        return configs / (self.file or f"{self.configs or self.name}_{ending}.yaml")

    @property
    def gpu_hours(self) -> float | None:
        """Of one run of the full schedule, an estimate; None where no speed is published."""
        if self.seconds_per_iteration is None:
            return None
        return 8 * self.iterations * self.seconds_per_iteration / 3600


@dataclass(frozen=True)
class EncoderExperiment:
    """What an encoder is worth by itself, by a command of pretrain/.

    `data`: its folder below $DETECTRON2_DATASETS; `trials` are the paper's; `flags` the command's.
    `starts`: row -> flags of a row that needs no checkpoint. `gpu_hours` of one run of a ResNet-50,
    as `measured` says; None where no time is published.
    """

    name: str
    title: str
    data: str
    trials: int = field(kw_only=True)
    flags: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    starts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True)
    gpu_hours: float | None = field(default=None, kw_only=True)
    measured: str | None = field(default=None, kw_only=True)
    trial_sd: Mapping[str, KnownDeviation] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ClassifierExperiment(EncoderExperiment):
    """A classifier that pretrain/linear.py trains, whose defaults are the linear protocol.

    `epochs` are the paper's; a `recipe` among the flags is a file in configs/.
    """

    epochs: int = field(kw_only=True)


@dataclass(frozen=True)
class FrozenExperiment(EncoderExperiment):
    """An evaluation of frozen features that ends with a file of numbers.

    `command`: its script in pretrain/, "voc_svm".
    """

    command: str = field(kw_only=True)


AnyExperiment = Experiment | EncoderExperiment


@dataclass(frozen=True)
class Part:
    """Columns of a table that come from one experiment.

    `columns`: heading -> "task/metric", or None for a number that only the paper has; `published`:
    row -> a number for each column, or None; `reference`: the row that gaps are given to.
    """

    experiment: AnyExperiment
    columns: Mapping[str, str | None]
    published: Mapping[str, Sequence[float | None]]
    heading: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class Table:
    """`note`: what a reader has to know of its published numbers."""

    name: str
    title: str
    source: str
    parts: tuple[Part, ...]
    note: str = ""

    def rows(self, own: Iterable[str]) -> list[str]:
        """Names of the rows, the paper's first; `own`: the user's, which the paper lacks."""
        published = dict.fromkeys(row for part in self.parts for row in part.published)
        return [*published, *own]


@dataclass(frozen=True)
class Grid:
    """`note`: what every table has to say of itself."""

    rows: Mapping[str, Row]
    tables: Mapping[str, Table]
    note: str = ""

    def select(self, names: Sequence[str]) -> list[Table]:
        """Tables by name or by how a name begins ("5", "6"); all for no name. Raises UserError."""
        if not names:
            return list(self.tables.values())
        chosen = {}
        for name in names:
            beginning = re.compile(rf"{re.escape(name)}(?!\d)")
            found = [name] if name in self.tables else list(filter(beginning.match, self.tables))
            if not found:
                raise UserError(f"no table {name!r}: there are {', '.join(self.tables)}")
            chosen |= {table: self.tables[table] for table in found}
        return list(chosen.values())

    def own_rows(self, weights: Iterable[str]) -> list[str]:
        return [name for name in weights if name not in self.rows]

    def label(self, row: str) -> str:
        return self.rows[row].label if row in self.rows else row

    def runs(
        self,
        tables: Sequence[Table],
        weights: Mapping[str, Path],
        trials: Sequence[int] | None,
        configs: Path,
        options: Sequence[str] = (),
        checkpoints: Mapping[str, Path] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> list["AnyRun"]:
        """Every run that the tables need, each once, the first trials of all before the second.

        Args:
            weights: row -> converted weights, the user's; for detectors.
            trials: numbers of the trials, which are their seeds; None: 1 to the paper's number.
            configs: the folder of the config files.
            options: config keys and values for every detector; the others heed MODEL.DEVICE cpu.
            checkpoints: row -> the user's file as it is; for classifiers and frozen features.
            flags: of pretrain/linear.py, for every classifier.
        """

        def make(experiment, row: Row, trial: int) -> AnyRun | None:
            if isinstance(experiment, EncoderExperiment):
                given = checkpoints or {}, configs, flags or {}, options
                return make_encoder_run(experiment, row, trial, *given)
            return make_run(experiment, row, trial, weights, configs, options)

        runs = {}
        for part in (part for table in tables for part in table.parts):
            for name in (*part.published, *self.own_rows(weights)):
                row = self.rows.get(name, Row(name, name))
                for trial in trials or range(1, part.experiment.trials + 1):
                    run = make(part.experiment, row, trial)
                    if run:
                        runs[run.name] = run
        return sorted(runs.values(), key=lambda run: run.trial)


@dataclass(frozen=True)
class Run:
    """One training with its evaluation. `trial` is its seed; `options`: keys and values."""

    experiment: Experiment
    row: str
    trial: int
    config_file: Path
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.row}/trial{self.trial}"


def make_run(
    experiment: Experiment,
    row: Row,
    trial: int,
    weights: Mapping[str, Path],
    configs: Path,
    options: Sequence[str] = (),
) -> Run | None:
    """One run, see `Grid.runs`; None for a row that needs a checkpoint which is not given."""
    if row.name in weights:
        ending, first = "moco", str(weights[row.name])
    elif row.config is not None or row.weights is not None:
        ending, first = row.config or "moco", row.weights
    else:
        return None
    config = experiment.config_file(configs, ending)
    start = () if first is None else ("MODEL.WEIGHTS", first)
    return Run(experiment, row.name, trial, config, (*experiment.options, *options, *start))


@dataclass(frozen=True)
class EncoderRun:
    """One run of a script of pretrain/, `command`, on an encoder. `trial` is its seed.

    `flags`: of the command, by their long names; `pretrained` is among them. `changed`: those of
    them that the user has given, in place of the paper's. `cpu`: not on a GPU.
    """

    experiment: EncoderExperiment
    row: str
    trial: int
    flags: Mapping[str, Any]
    changed: Mapping[str, Any] = field(default_factory=dict)
    cpu: bool = False

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.row}/trial{self.trial}"


class ClassifierRun(EncoderRun):
    """One training of a classifier with its evaluation."""

    command = "linear"


class FrozenRun(EncoderRun):
    """One evaluation of frozen features."""

    @property
    def command(self) -> str:
        return self.experiment.command


AnyRun = Run | EncoderRun


def make_encoder_run(
    experiment: EncoderExperiment,
    row: Row,
    trial: int,
    checkpoints: Mapping[str, Path],
    configs: Path,
    flags: Mapping[str, Any],
    options: Sequence[str] = (),
) -> EncoderRun | None:
    """One run, see `Grid.runs`; None for a row that needs a checkpoint which is not given."""
    if row.name in checkpoints:
        start = {"pretrained": str(checkpoints[row.name])}
    elif row.name in experiment.starts:
        start = experiment.starts[row.name]
    else:
        return None
    paper = {"arch": row.arch} | experiment.flags | start
    if "recipe" in paper:
        paper["recipe"] = str(configs / paper["recipe"])
    cpu = ("MODEL.DEVICE", "cpu") in zip(options[::2], options[1::2], strict=True)
    if isinstance(experiment, FrozenExperiment):
        return FrozenRun(experiment, row.name, trial, paper, cpu=cpu)
    return ClassifierRun(experiment, row.name, trial, paper | flags, flags, cpu)


def load_grid(path: Path = FOLDER / "paper.yaml", **places: Path) -> Grid:
    """Read a grid; paper.yaml says what is in one.

    `places`: what names in braces stand for in the options, such as {data}.
    """
    content = read_mapping(path, "grid")
    rows = {name: Row(name, **entry) for name, entry in content["rows"].items()}
    experiments = {
        name: _experiment(name, entry, places) for name, entry in content["experiments"].items()
    }
    for section, kind in (("classifiers", ClassifierExperiment), ("frozen", FrozenExperiment)):
        for name, entry in content.get(section, {}).items():
            data = entry["data"].format(**places)
            experiments[name] = kind(name, **entry | {"data": data})
    tables = {}
    for name, entry in content["tables"].items():
        parts = tuple(_part(part, experiments) for part in entry["parts"])
        tables[name] = Table(name, **entry | {"parts": parts})
    return Grid(rows, tables, content.get("note", ""))


def _experiment(name: str, entry: dict, places: Mapping[str, Path]) -> Experiment:
    known = {metric: KnownDeviation(**about) for metric, about in entry.get("trial_sd", {}).items()}
    options = tuple(str(option).format(**places) for option in entry.get("options", ()))
    classes = tuple(entry.get("classes", ()))
    return Experiment(name, **entry | {"trial_sd": known, "options": options, "classes": classes})


def _part(entry: dict, experiments: Mapping[str, AnyExperiment]) -> Part:
    nothing = [None] * len(entry["columns"])
    published = {row: numbers or nothing for row, numbers in entry["published"].items()}
    experiment = experiments[entry["experiment"]]
    return Part(**entry | {"experiment": experiment, "published": published})
