"""The toy reproduction: drawn images, a MoCo pretraining of a minute, and the grid of quick.yaml.

OUTPUT/data/       what `procedural_tasks` draws
OUTPUT/pretrain/   the checkpoint that goes in
"""

import sys
from pathlib import Path

from moco_det.benchmark.jobs.grid import FOLDER, Grid, load_grid
from moco_det.benchmark.jobs.steps import Step, StepFailed, run_steps
from moco_det.common.errors import UserError

RECIPE = "configs/pretrain/reproduce_quick_r50.yaml"
ROW = "moco"  # of quick.yaml


def quick_grid(output: Path) -> Grid:
    return load_grid(FOLDER / "quick.yaml", data=output / "data")


def quick_checkpoint(output: Path) -> dict[str, Path]:
    """Row -> the checkpoint that `prepare_quick` makes."""
    return {ROW: output / "pretrain/checkpoint_last.pth.tar"}


def prepare_quick(repository: Path, output: Path, pretraining: bool) -> None:
    """Draw the images and, if `pretraining` is wanted, pretrain on them, each unless it is done.

    Raises:
        UserError: one of the two failed.
    """
    draw = ["-m", "moco_det.benchmark.synthetic.tasks", "--output", output / "data"]
    pretrain = [repository / "pretrain/main.py", output / "data/images", "--resume", "auto"]
    pretrain += ["--recipe", repository / RECIPE, "--output", output / "pretrain", "--seed", 0]
    output.mkdir(parents=True, exist_ok=True)
    wanted = [("draw", draw, 10)] + ([("pretrain", pretrain, 60)] if pretraining else [])
    for name, command, seconds in wanted:
        done = output / f"{name}.done"
        if not done.exists():
            step = Step(name, name, [sys.executable, *map(str, command)], seconds)
            try:
                run_steps([step], output / f"{name}.log")
            except StepFailed as failure:
                raise UserError(str(failure)) from failure
            done.touch()
