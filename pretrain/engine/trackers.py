"""Where a run's numbers and pictures can be watched: TensorBoard, Weights & Biases, MLflow.

`RunLog` writes to all that --log names by the same few calls. To add another is to add a subclass
of Tracker to TRACKERS, and its package to `moco_det.common.errors.EXTRAS`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moco_det.common.documents import read_json
from moco_det.common.errors import UserError, import_optional, one_line
from moco_det.common.files import write_json

RUNS = "trackers.json"  # in --output: tracker -> the run that a resumed one goes on with
PROJECT = "moco_det"  # where the user's environment names none
LONGEST_PARAMETER = 250  # characters that older MLflow servers take

# Groups of values by name; all other values are of what is trained, see `Task.group`.
GROUPS = {
    "speed": {"images_per_second", "data_wait", "seconds_per_step", "gpu_memory_gib"},
    "features": {"knn_top1", "feature_std"},
    "validation": {"val_loss", "val_acc1", "val_acc5"},
    "schedule": {"epoch", "lr"},
}


def grouped(name: str, group: str) -> str:
    """The name of a value among those of its kind: "lr" -> "schedule/lr", "loss" -> "GROUP/loss".

    Args:
        group: that of what is trained.
    """
    return f"{next((key for key, names in GROUPS.items() if name in names), group)}/{name}"


class Tracker:
    """One of them. Names are those of `grouped`.

    Args:
        output: folder of the run.
        step: that it resumes from; 0 for a new run.
        run: the id that the run has had here so far; None for a new one.
    """

    run: str | None = None  # to be kept for those who resume
    begins = True  # whether the run is a new one here
    appends = True  # whether what is written twice is there twice

    def __init__(self, output: Path, step: int, run: str | None):
        raise NotImplementedError

    def settings(self, flags: dict) -> None:
        """The flags of a run that begins here."""
        raise NotImplementedError

    def numbers(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """`pixels`: uint8 RGB, H x W x 3."""
        raise NotImplementedError

    def close(self, failed: bool) -> None:
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in the run's folder."""

    appends = False

    def __init__(self, output: Path, step: int, run: str | None):
        # It drops what it has from that step on; a run from 0 logs the kNN of step 0 anew.
        self.writer = SummaryWriter(str(output), purge_step=step + 1 if step else 0)

    def settings(self, flags: dict) -> None:
        """As hyperparameters of the run that the scalars are of; `add_hparams` begins another."""
        simple = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in flags.items()}
        for summary in hparams(simple, dict.fromkeys(("features/knn_top1", "pretext/loss"), 0.0)):
            self.writer.file_writer.add_summary(summary)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of the project that WANDB_PROJECT names; a resumed one is the same run."""

    def __init__(self, output: Path, step: int, run: str | None):
        self.package = import_optional("wandb", "--log wandb", "wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.active = self.package.init(
            project=project, name=output.name, dir=str(output), id=run, resume="allow"
        )
        self.run = self.active.id
        # Its own count of steps never goes back, as a run does that resumes an earlier checkpoint.
        self.active.define_metric("step")
        self.active.define_metric("*", step_metric="step")

    def settings(self, flags: dict) -> None:
        self.active.config.update(flags, allow_val_change=True)

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.active.log({**values, "step": step})

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.active.log({name: self.package.Image(pixels), "step": step})

    def close(self, failed: bool) -> None:
        self.active.finish(exit_code=int(failed))


class MLflow(Tracker):
    """A run of the experiment that MLFLOW_EXPERIMENT_NAME names, where MLFLOW_TRACKING_URI says."""

    def __init__(self, output: Path, step: int, run: str | None):
        self.package = import_optional("mlflow", "--log mlflow", "mlflow")
        self.package.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self.run = self.package.start_run(run_id=run, run_name=output.name).info.run_id

    def settings(self, flags: dict) -> None:
        self.package.log_params({k: str(v)[:LONGEST_PARAMETER] for k, v in flags.items()})

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.package.log_metrics(values, step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.package.log_image(pixels, artifact_file=f"{name}/{step:08d}.png")

    def close(self, failed: bool) -> None:
        self.package.end_run("FAILED" if failed else "FINISHED")


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
PACKAGES = {"wandb", "mlflow"}  # that everybody need not have


def check_packages(names: Iterable[str]) -> None:
    """Raises UserError, which names the extra, where a tracker's package is not installed."""
    for name in names:
        if name in PACKAGES:
            import_optional(name, f"--log {name}", name)


def open_trackers(names: Iterable[str], output: Path, step: int) -> dict[str, Tracker]:
    """Those of the names. Raises UserError where one cannot be begun, such as for want of a login.

    `step`: see `Tracker`.
    """
    path, runs, opened = output / RUNS, {}, {}
    if step and path.exists():
        runs = read_json(path, "file of trackers")
        if not isinstance(runs, dict) or not all(isinstance(run, str) for run in runs.values()):
            raise UserError(f"{path} does not name the run of each tracker: remove it")
    for name in names:
        try:
            opened[name] = TRACKERS[name](output, step, runs.get(name))
        except Exception as error:  # what a service and its network may raise is without end
            if isinstance(error, UserError) or name not in PACKAGES:
                raise
            raise UserError(f"--log {name}: {one_line(error, 200)}") from error
        opened[name].begins = name not in runs if name in PACKAGES else step == 0
    runs = {name: tracker.run for name, tracker in opened.items() if tracker.run}
    if runs:
        write_json(path, runs)
    return opened
