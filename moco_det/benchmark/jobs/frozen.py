"""A frozen evaluation's run as a job: a script of pretrain/ that ends with a file of numbers.

OUTPUT/runs/EXPERIMENT/ROW/trialN/results.json   its --output

Such a script saves nothing on its way: one that was killed begins anew.
"""

import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from moco_det.benchmark.jobs.encoder_runs import data_folder, encoder_command, identity, parsed
from moco_det.benchmark.jobs.grid import FrozenRun
from moco_det.benchmark.jobs.job import FINISHED, Command, Job, JobFolder
from moco_det.common.documents import read_json, shown
from moco_det.common.errors import UserError, import_optional
from pretrain.data.davis import Davis
from pretrain.data.segmented import find_segmented
from pretrain.data.voc_labels import find_voc
from pretrain.evaluation.svm import NEEDS

RESULTS = "results.json"


class FrozenFolder(JobFolder):
    """Where one run keeps its files."""

    def __init__(self, run: FrozenRun, output: Path):
        super().__init__(run.name, output / "runs" / run.name)
        self.run = run

    @property
    def file(self) -> Path:
        return self.path / RESULTS

    def results(self) -> dict[str, float]:
        """Measure -> number, in percent; {} where there is none. Raises UserError."""
        if not os.path.lexists(self.file):
            return {}
        content = read_json(self.file, "the results")
        if not isinstance(content, dict):
            raise UserError(f"{self.file} holds no measures: remove that folder")
        for name, value in content.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value)):
                raise UserError(f"{self.file}: {name} is {shown(value)}: remove that folder")
        return content

    def losses(self) -> list[tuple[int, float]]:
        """Nothing is trained."""
        return []

    def shortened(self) -> None:
        """There is no schedule."""

    def check_files(self, state: str) -> None:
        if state == FINISHED and not self.results():
            raise UserError(f"{self.file} holds no measures: remove that folder")


def frozen_job(folder: FrozenFolder, gpus: int, launch: Sequence[str] = ()) -> Job:
    """`launch` and errors: see `encoder_command`."""
    run = folder.run
    command = encoder_command(run, gpus, launch, "--output", str(folder.file))
    return Job(
        folder,
        [Command(run.experiment.name, command)],
        identity(run),
        # Its numbers stay in their file.
        read_result=lambda: {} if folder.results() else None,
        about={"engine": "pretrain", "seed": run.trial, "gpus": gpus},
    )


# -- before the first run -------------------------------------------------------------------------


def _check_voc_svm(data: Path, args: Namespace) -> None:
    import_optional("sklearn.svm", *NEEDS)
    find_voc(data, args.train_split, args.test_split)


def _check_segment_retrieval(data: Path, args: Namespace) -> None:
    import_optional("sklearn.cluster", "segment retrieval", "scikit-learn")
    for split in (args.train_split, "val"):
        find_segmented(data, split)


def _check_davis(data: Path, args: Namespace) -> None:
    Davis(data, args.split).videos()


CHECKS: dict[str, Callable[[Path, Namespace], None]] = {
    "voc_svm": _check_voc_svm,
    "segment_retrieval": _check_segment_retrieval,
    "davis": _check_davis,
}


def check_data(run: FrozenRun) -> None:
    """Raises UserError where the script lacks its data, or a package."""
    data = data_folder(run)
    try:
        CHECKS[run.command](data, parsed(run))
    except UserError as error:
        raise UserError(
            f"{error}; link the data set as {data}, or set DETECTRON2_DATASETS to the folder that "
            f"holds {data.name}/"
        ) from error
