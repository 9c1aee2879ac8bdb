"""A detector's run as a job: the weights that it starts from, its command, its numbers.

OUTPUT/weights/ROW.pkl               a converted checkpoint; ROW/ is the conversion's folder
OUTPUT/runs/EXPERIMENT/ROW/trialN/   OUTPUT_DIR of tools/train_net.py: metrics.json,
                                     config.yaml, inference/, checkpoints
"""

import functools
import hashlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_det.benchmark.jobs.classifiers import ClassifierFolder, classifier_job
from moco_det.benchmark.jobs.frozen import FrozenFolder, frozen_job
from moco_det.benchmark.jobs.grid import DEFAULT_ROW, AnyRun, ClassifierRun, FrozenRun, Run
from moco_det.benchmark.jobs.job import FINISHED, Command, Job, JobFolder, script_job
from moco_det.benchmark.jobs.runner import run_in_order
from moco_det.common.documents import (
    mend_last_line,
    read_json,
    read_json_lines,
    read_mapping,
    shown,
)
from moco_det.common.errors import UserError, one_line
from moco_det.common.files import file_hash
from moco_det.common.installation import own_file
from moco_det.common.weight_layouts import DETECTRON2, find_wrapped_layout
from moco_det.common.weight_sources import is_remote, kept_file, local_file, read_state_dict
from moco_det.config.loading import KEYS, get_cfg, load_config


class RunFolder(JobFolder):
    """Where one run keeps its files."""

    def __init__(self, run: Run, output: Path):
        super().__init__(run.name, output / "runs" / run.name)
        self.run = run

    def iteration(self) -> int:
        """How many iterations are done, as far as metrics.json tells."""
        lines = read_metrics(self.path)
        return max((line["iteration"] + 1 for line in lines if "lr" in line), default=0)

    def progress(self) -> str:
        return f"iteration {self.iteration()}"

    def results(self) -> dict[str, float]:
        """See `read_results`."""
        return read_results(self.path)

    def losses(self) -> list[tuple[int, float]]:
        """(iteration from 1, total loss)."""
        lines = (line for line in read_metrics(self.path) if line.get("total_loss") is not None)
        return [(line["iteration"] + 1, line["total_loss"]) for line in lines]

    def check_files(self, state: str) -> None:
        results, path = self.results(), self.path / "metrics.json"
        if state == FINISHED:
            if not results:
                raise UserError(f"{path} holds no evaluation: remove that folder")
            self.schedule()

    def shortened(self) -> str | None:
        """How much shorter than the paper's the schedule of a finished run was; None: not at all.

        Raises UserError as `schedule`.
        """
        experiment, (iterations, batch) = self.run.experiment, self.schedule()
        share = iterations * batch / (experiment.iterations * experiment.batch)
        if share >= 1:
            return None
        return (
            f"{experiment.name} ran {iterations} iterations of {batch} images, {100 * share:.2g} % "
            f"of the paper's {experiment.iterations} of {experiment.batch}"
        )

    def schedule(self) -> tuple[int, int]:
        """(iterations, images per step) of config.yaml. Raises UserError where it lacks them."""
        path = self.path / "config.yaml"
        solver = read_mapping(path, "config").get("SOLVER")
        names = ("MAX_ITER", "IMS_PER_BATCH")
        found = [solver.get(name) if isinstance(solver, dict) else None for name in names]
        if not all(isinstance(number, int) and number > 0 for number in found):
            raise UserError(f"config {path} lacks SOLVER.{' or SOLVER.'.join(names)}")
        iterations, images = found
        return iterations, images

    def repair(self) -> None:
        """Drop a line of metrics.json that a kill has cut off: the next would be appended to it."""
        mend_last_line(self.path / "metrics.json")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of an OUTPUT_DIR's metrics.json, less those that a resumed run has repeated.

    Numbers that are not finite are None. Raises UserError where the file cannot be read.
    """
    path = folder / "metrics.json"
    if not os.path.lexists(path):
        return []
    lines: list[dict[str, Any]] = []
    for number, content in enumerate(read_json_lines(path, "metrics", finite=False), 1):
        line = {name: _number(value) for name, value in content.items()}
        wrong = [name for name, value in line.items() if value is False]
        iteration = content.get("iteration")
        if wrong or isinstance(iteration, bool) or not isinstance(iteration, int):
            name = wrong[0] if wrong else "iteration"
            raise UserError(
                f"metrics {path}, line {number}: {one_line(name, 40)} is "
                f"{shown(content.get(name))}: remove that line, or that folder"
            )
        if "lr" in line:  # of training, not of an evaluation
            lines = [old for old in lines if old["iteration"] < iteration]
        lines.append(line)
    return lines


def _number(value: object) -> float | None | bool:
    """A finite number as it is, None for None and other numbers, False for what is none."""
    if value is None or isinstance(value, int | float) and not isinstance(value, bool):
        return value if value is not None and math.isfinite(value) else None
    return False


def read_results(folder: Path) -> dict[str, float]:
    """The last evaluation in an OUTPUT_DIR, "task/metric" -> percent; {} where there was none."""
    evaluations = [line for line in read_metrics(folder) if any("/" in key for key in line)]
    last = evaluations[-1] if evaluations else {}
    return {key: value for key, value in last.items() if "/" in key and value is not None}


# -- runs as jobs ---------------------------------------------------------------------------------

AnyFolder = RunFolder | ClassifierFolder | FrozenFolder


@dataclass(frozen=True)
class Settings:
    """What all runs of a reproduction have in common.

    `engine`: "native" or "detectron2"; `gpus`: processes of a run on each machine; `retries`: how
    often a failed run is begun again.
    """

    output: Path
    engine: str
    gpus: int = 1
    retries: int = 1

    def folder(self, run: AnyRun) -> AnyFolder:
        kinds = {ClassifierRun: ClassifierFolder, FrozenRun: FrozenFolder, Run: RunFolder}
        return kinds[type(run)](run, self.output)

    def command(self, run: Run, launch: Sequence[str] = ()) -> list[str]:
        """tools/train_net.py with its arguments.

        `launch`: torchrun and its arguments; without it the script starts its processes itself.
        """
        script = str(own_file("tools/train_net.py"))
        return [
            *(launch or [sys.executable]), script, "--resume", "--engine", self.engine,
            *([] if launch else ["--num-gpus", str(self.gpus)]),
            "--config-file", str(run.config_file), *run.options,
            "SEED", str(run.trial), "OUTPUT_DIR", str(self.folder(run).path),
        ]  # fmt: skip

    def job(self, run: AnyRun, launch: Sequence[str] = ()) -> Job:
        """Runs of one experiment are expected to take equally long."""
        folder = self.folder(run)
        if isinstance(run, ClassifierRun):
            return classifier_job(folder, self.gpus, launch)
        if isinstance(run, FrozenRun):
            return frozen_job(folder, self.gpus, launch)
        return Job(
            folder,
            [Command(run.experiment.name, self.command(run, launch))],
            identity(run, self.engine),
            # Its numbers stay in metrics.json; a run that was not evaluated has failed.
            read_result=lambda: {} if folder.results() else None,
            about={
                "config_file": str(run.config_file),
                "engine": self.engine,
                "seed": run.trial,
                "gpus": self.gpus,
            },
        )


def identity(run: Run, engine: str) -> dict[str, Any]:
    """See `Job`."""
    settings = dict(zip(run.options[::2], run.options[1::2], strict=True))
    weights = settings.pop("MODEL.WEIGHTS", None)
    if weights and Path(weights).is_file():
        weights = file_hash(Path(weights))
    return {
        "config": run.config_file.name,
        "config_hash": _config_hash(run.config_file),
        "options": settings,
        "weights": weights,
        "seed": run.trial,
        "engine": engine,
    }


@functools.cache
def _config_hash(path: Path) -> str:
    """Of all values that the file and those below it give; "" where there is no such file."""
    if not path.is_file():
        return ""
    cfg, defaults = load_config(str(path)), get_cfg()
    cfg.defrost()
    for key in KEYS["later"]:
        *sections, name = key.split(".")
        node, default = (functools.reduce(getattr, sections, tree) for tree in (cfg, defaults))
        if node[name] == default[name]:
            del node[name]
    return hashlib.sha256(cfg.dump().encode()).hexdigest()[:16]


# -- the checkpoints that a user gives ------------------------------------------------------------


def named_checkpoints(
    words: Sequence[str], default: str = DEFAULT_ROW, download: bool = True
) -> dict[str, Path]:
    """`NAME=CKPT`, or `CKPT` for the row `default` -> {row: file}.

    CKPT is a file, or what `weight_sources.local_file` knows besides.

    Args:
        download: what is no file of this machine; otherwise it is given as if it were one.

    Raises:
        UserError: a name that is given twice, is none or is `random`; a missing file.
    """
    checkpoints: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or "://" in name:  # an address may have one
            name, path = default, word
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == "random":
            raise UserError(f"--weights {word}: {name!r} cannot name a row: use letters, digits, _")
        if name in checkpoints:
            raise UserError(f"--weights: two checkpoints for the row {name}: write NAME=CKPT")
        if is_remote(path):
            file = local_file(path) if download else kept_file(path)
            checkpoints[name] = file or Path(path)
        elif Path(path).is_file():
            checkpoints[name] = Path(path).resolve()
        else:
            raise UserError(f"--weights {word}: {path} is not a file")
    return checkpoints


def weight_file(name: str, source: Path, output: Path) -> Path:
    """Where the weights of a row are: the file itself where it is Detectron2's already.

    A file that is still to be made, by a pretraining, is taken for a checkpoint.
    """
    is_detectron2 = (
        source.is_file() and find_wrapped_layout(read_state_dict(source)[0])[0] is DETECTRON2
    )
    return source if is_detectron2 else output / "weights" / f"{name}.pkl"


def convert(checkpoints: Mapping[str, Path], output: Path) -> None:
    """Make the files that `weight_file` names, but for those that are there already.

    Raises:
        UserError: a checkpoint cannot be converted, or another one than before is given for a row.
    """
    jobs = []
    for name, source in checkpoints.items():
        target = weight_file(name, source, output)
        if target != source:
            jobs.append(_conversion(name, source, target))
    run_in_order(jobs)


def _conversion(name: str, source: Path, target: Path) -> Job:
    def earlier_note() -> dict[str, Any]:
        """weights/ROW.json of the first version: {hash, source}, once the file was there."""
        note = target.with_suffix(".json")
        if not note.is_file():
            return {}
        known = read_json(note, "the note")
        identity = {"hash": known["hash"]}
        return {"state": FINISHED, "identity": identity, "source": known["source"]}

    folder = JobFolder(f"convert {name}", target.with_suffix(""), earlier_note)
    identity, known = {"hash": file_hash(source)}, folder.record
    if known and not target.is_file():
        folder.write_record({})  # what an earlier conversion has made is gone
    elif known.get("identity", identity) != identity:
        raise UserError(
            f"{target} was made from {known['source']}, which was another checkpoint than "
            f"{source}: name another row or another --output"
        )
    return script_job(
        folder,
        [own_file("tools/convert_to_d2.py"), source, target],
        seconds=15,
        identity=identity,
        about={"source": str(source)},
    )
