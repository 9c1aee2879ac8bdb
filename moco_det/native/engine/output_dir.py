"""What a run leaves in OUTPUT_DIR, with Detectron2's names and layout: checkpoints and metrics."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch.utils.tensorboard import SummaryWriter

from moco_det.common.documents import mend_last_line
from moco_det.common.errors import UserError
from moco_det.common.files import write_text
from moco_det.common.resume_state import (
    check_count,
    check_dict,
    check_scaler,
    entries_of,
    named_last,
    newest_whole,
)
from moco_det.common.weight_sources import read_state_dict
from moco_det.datasets import Dataset
from moco_det.visualize import compared
from moco_det.weights.files import write_weights

Content = TypeVar("Content")

# -- checkpoints ----------------------------------------------------------------------------------


class Checkpoints:
    """The `.pth` files of one OUTPUT_DIR; the text file `last_checkpoint` names the newest.

    Names and layout are Detectron2's. Each file is written beside its destination and renamed, so
    that a reader, and a run that was killed, only ever find whole ones.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._tag = self.folder / "last_checkpoint"

    def last(self) -> Path | None:
        """The newest checkpoint, for messages; None where nothing was saved that can be named."""
        with contextlib.suppress(UserError):
            return named_last(self._tag)
        return None

    def newest_whole(self, read: Callable[[Path], Content]) -> tuple[Path, Content] | None:
        """The last checkpoint and what `read` makes of it; None where nothing was saved yet.

        Where it is damaged, the newest one that is whole, with a warning.

        Raises:
            UserError: `last_checkpoint` names a file outside the folder, or none is whole.
        """
        return newest_whole(self._tag, self.folder.glob("model_*.pth"), read)

    def save(self, name: str, content: dict) -> Path:
        """Write `{name}.pth` and make it the last one. For one process of a run only.

        Raises:
            UserError: it cannot be written (a full disk); the previous checkpoint is intact.
        """
        path = self.folder / f"{name}.pth"
        previous = self.last()
        try:
            write_weights(path, content)
        except UserError as error:
            kept = (
                f"the previous checkpoint, {previous}, is intact" if previous else "none is saved"
            )
            raise UserError(f"{error}; {kept}") from error
        write_text(self._tag, path.name)
        return path

    @staticmethod
    def load(path: Path) -> dict:
        """What `save` was given, its tensors on the CPU.

        Raises:
            UserError: the file is missing, damaged, or not a checkpoint of a training run.
        """
        model, rest = read_state_dict(path)
        missing = {"optimizer", "scheduler", "iteration"} - rest.keys()
        if missing:
            raise UserError(f"cannot resume from {path}: it lacks {', '.join(sorted(missing))}")
        with entries_of(path):
            check_count("iteration", rest["iteration"])
            check_count("seed", rest.get("seed", 0), 2**63)
            for name in ("optimizer", "scheduler"):
                check_dict(name, rest[name])
            check_scaler(rest.get("grad_scaler", {}))
        return {"model": model, **rest}


# -- metrics --------------------------------------------------------------------------------------

PERIOD = 20  # iterations between two lines, and the window of the medians in them
WARMUP = 3  # first iterations, whose time says nothing about the later ones'


class MetricLog:
    """Collects per-iteration scalars, and writes their medians every `PERIOD` iterations.

    To the console, to metrics.json and to TensorBoard's event files, as Detectron2 does.
    metrics.json has one JSON object a line, with the 0-based "iteration"; a resumed run appends.
    Its "eta_seconds" are those to the end of the run, with evaluations and checkpoints that are as
    long as those before.

    Args:
        folder: OUTPUT_DIR; must exist.
        start_iter, max_iter: iterations [start_iter, max_iter) are to come.
    """

    def __init__(self, folder: str | Path, start_iter: int, max_iter: int):
        self.start_iter, self.max_iter = start_iter, max_iter
        self._history: dict[str, HistoryBuffer] = {}
        self._stages: dict[str, tuple[int, list[float]]] = {}  # period, seconds of each so far
        path = Path(folder) / "metrics.json"
        mend_last_line(path)  # a kill leaves half of one
        self._json = open(path, "a", buffering=1)  # noqa: SIM115
        self._events = SummaryWriter(str(folder))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):  # a full disk has been reported when writing
            self._json.close()
            self._events.close()

    def step(self, iteration: int, lr: float, seconds: float, metrics: dict[str, float]) -> None:
        """One finished iteration: it took `seconds`; `metrics` has the losses and "data_time"."""
        if iteration >= self.start_iter + WARMUP:
            metrics = metrics | {"time": seconds}
        for name, value in metrics.items():
            self._history.setdefault(name, HistoryBuffer()).update(value, iteration)
        if (iteration + 1) % PERIOD == 0 or iteration + 1 == self.max_iter:
            scalars = {name: values.median(PERIOD) for name, values in self._history.items()}
            scalars["lr"] = lr
            if "time" in self._history:
                left = self.max_iter - iteration - 1
                seconds = self._history["time"].median(1000) * left
                scalars["eta_seconds"] = seconds + self._seconds_of_stages(iteration)
            print(_progress_line(iteration, scalars), flush=True)
            self.write(iteration, scalars)

    @contextlib.contextmanager
    def timed(self, stage: str, period: int):
        """What is done while this is open is a stage that comes every `period` iterations (0: none)
        and after the last one."""
        begun = time.perf_counter()
        yield
        self._stages.setdefault(stage, (period, []))[1].append(time.perf_counter() - begun)

    def _seconds_of_stages(self, iteration: int) -> float:
        """Of those that are to come after the step of `iteration`."""
        total = 0.0
        for period, taken in self._stages.values():
            before_last = (self.max_iter - 1) // period - iteration // period if period else 0
            total += (before_last + 1) * sum(taken) / len(taken)
        return total

    def predictions(self, iteration: int, dataset: Dataset, predictions: list[dict]) -> None:
        """Some images of a test set, what is annotated on the left, what was found on the right."""
        try:
            for name, picture in compared(dataset, predictions):
                self._events.add_image(f"predictions/{name}", picture, iteration)
        except OSError as error:
            raise UserError(f"cannot write to {self._events.log_dir}: {error}") from error

    def results(self, iteration: int, results: dict) -> None:
        """Evaluation results, nested or not, as "task/metric"."""
        self.write(iteration, dict(_flat(results)))

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        # JSON has no NaN, which is the AP of a class that the test set does not hold.
        line = {name: finite.get(name) for name in scalars} | {"iteration": iteration}
        try:
            self._json.write(json.dumps(line, sort_keys=True) + "\n")
            for name, value in finite.items():
                self._events.add_scalar(name, value, iteration)
        except OSError as error:
            raise UserError(f"cannot write the metrics to {self._json.name}: {error}") from error


def _progress_line(iteration: int, scalars: dict[str, float]) -> str:
    parts = [f"iter: {iteration}"]
    if "eta_seconds" in scalars:
        parts.insert(0, f"eta: {timedelta(seconds=int(scalars['eta_seconds']))}")
    parts += [f"{name}: {value:.4g}" for name, value in scalars.items() if "loss" in name]
    parts += [f"{key}: {scalars[key]:.4f}" for key in ("time", "data_time") if key in scalars]
    parts.append(f"lr: {scalars['lr']:.5g}")
    if torch.cuda.is_available():
        parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
    return "  ".join(parts)


def _flat(results: dict, prefix: str = ""):
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)
