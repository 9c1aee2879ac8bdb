"""The main job on drawn images: draw, pretrain, then a reproduction of one small experiment.

What a run leaves in its folder:

    data/                      the drawn data set, unless the user has brought one
    pretrain/                  checkpoint_last.pth.tar, metrics.jsonl
    weights/moco.pkl           the converted backbone
    runs/quickstart/<start>/trial<seed>/   a detector, see `runs`; <start>: moco, random
    report.html, report.json

Each of these folders is that of a job.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from moco_det.benchmark.jobs.grid import Experiment, Row, Run, make_run
from moco_det.benchmark.jobs.job import RUNNING, Job, JobFolder, cores, script_job
from moco_det.benchmark.jobs.runner import Slot, gpu_slots, run_in_order, run_side_by_side
from moco_det.benchmark.jobs.runs import Settings, convert, weight_file
from moco_det.benchmark.report.quickstart import collect, draw_pairs, write_report
from moco_det.benchmark.synthetic.images import CLASSES
from moco_det.common.errors import UserError
from moco_det.common.installation import own_file
from moco_det.config.loading import load_config
from moco_det.datasets import get_dataset

ROWS = (Row("moco", "MoCo"), Row("random", "random init.", weights=""))
LABELLED_SCENES = 50  # of the embedded data set: few, for labels are what pretraining saves
MOST_SEEDS = 1000
MOST_AT_A_TIME = 4  # detectors side by side on a CPU: each takes a gigabyte
MARK = ".quickstart"  # a folder that holds this file was made by a quickstart


@dataclass(frozen=True)
class Quickstart:
    """What to run on what. `train` and `test` are data set names as `get_dataset` takes them."""

    output: Path
    images: Path
    train: str
    test: str
    classes: tuple[str, ...]
    embedded: bool
    recipe: Path
    config_file: Path
    seed: int
    seeds: int

    @property
    def pretrain_folder(self) -> Path:
        return self.output / "pretrain"

    @property
    def checkpoint(self) -> Path:
        return self.pretrain_folder / "checkpoint_last.pth.tar"

    @property
    def detector_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    @property
    def settings(self) -> Settings:
        return Settings(self.output, "native", retries=0)

    def runs(self) -> list[Run]:
        """A detector for each start and seed; the start changes its first weights, nothing else."""
        options = {
            "DATASETS.TRAIN": (self.train,),
            "DATASETS.TEST": (self.test,),
            "MODEL.ROI_HEADS.NUM_CLASSES": len(self.classes),
        }
        experiment = Experiment(
            name="quickstart",
            title="The quickstart's detector",
            file=str(self.config_file),
            iterations=0,  # there is no paper whose schedule it could have
            batch=0,
            trials=self.seeds,
            options=tuple(str(word) for pair in options.items() for word in pair),
        )
        weights = {"moco": weight_file("moco", self.checkpoint, self.output)}
        return [
            make_run(experiment, row, seed, weights, own_file("configs"))
            for seed in self.detector_seeds
            for row in ROWS
        ]


def make_plan(
    output: Path,
    recipe: Path,
    config_file: Path,
    seed: int,
    seeds: int,
    images: Path | None = None,
    voc: Path | None = None,
) -> Quickstart:
    """Check what can be checked before minutes are spent. Raises UserError.

    Args:
        images, voc: the user's data, both or neither; neither: the embedded data set.
        seed: of drawing, pretraining and the first pair of detectors; later pairs count up.
    """
    if not (1 <= seeds <= MOST_SEEDS and 0 <= seed < 2**31):
        raise UserError(
            "--seeds must be at least 1, and --seed at least 0 (and at most "
            f"{MOST_SEEDS} and {2**31 - 1})"
        )
    if (images is None) != (voc is None):
        raise UserError("--images and --voc go together: unlabelled images, and annotated ones")
    for path in (recipe, config_file):
        if not path.is_file():
            raise UserError(f"{path} is not a file")
    load_config(str(config_file))  # its mistakes are told before the pretraining
    output = output.resolve()
    embedded = images is None
    if embedded:
        images, voc, splits = output / "data/images", output / "data/scenes", ("train", "test")
        classes = CLASSES
    else:
        images, voc = images.resolve(), voc.resolve()
        if not images.is_dir():
            raise UserError(f"--images {images} is not a folder")
        splits = voc_splits(voc)
        classes = get_dataset(f"voc:{voc}:{splits[1]}").classes
    train, test = (f"voc:{voc}:{split}" for split in splits)
    where = {"output": output, "recipe": recipe.resolve()}
    return Quickstart(
        **where, images=images, train=train, test=test, classes=classes, embedded=embedded,
        config_file=config_file.resolve(), seed=seed, seeds=seeds,
    )  # fmt: skip


def voc_splits(root: Path) -> tuple[str, str]:
    """Names of the training and the test split among those that `root` has.

    `test` is tested on where there is one, and `trainval` (else `train`) trained on. Without it
    `train` and `val` are used, since `trainval` contains `val`. Raises UserError otherwise.
    """
    folder = root / "ImageSets" / "Main"
    present = {path.stem for path in folder.glob("*.txt")}
    for train, test in (("trainval", "test"), ("train", "test"), ("train", "val")):
        if {train, test} <= present:
            return train, test
    raise UserError(
        f"--voc {root}: {folder} needs train.txt or trainval.txt, and test.txt (or train.txt and "
        f"val.txt); it has {', '.join(sorted(present)) or 'no .txt file'}"
    )


def prepare_output(output: Path) -> None:
    """Make `output` a fresh folder: new, empty, or an earlier quickstart's, whose files go.

    Raises UserError for a folder that holds anything else, so that nothing of the user's is lost,
    and where a command of an earlier quickstart that was killed still runs.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        ours = (output / MARK).exists()
        if not ours and any(output.iterdir()):
            raise UserError(f"--output {output} holds other files: name a new or an empty folder")
        for folder in (lock.parent for lock in output.rglob("run.lock")):
            if JobFolder(folder.name, folder).look().state == RUNNING:
                raise UserError(f"{folder} is still being written by an earlier quickstart")
        (output / MARK).write_text("Made by tools/quickstart.py; its next run starts afresh.\n")
        for name in ("data", "pretrain", "weights", "runs"):
            if (output / name).is_dir():
                shutil.rmtree(output / name)
        for file in (*output.glob("report.*"), *output.glob("quickstart.log")):
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from error


def preparation(plan: Quickstart) -> list[Job]:
    """What comes before the detectors. The seconds are those of two CPU cores."""
    draw = ["-m", "moco_det.benchmark.synthetic.images", "--output", plan.images.parent]
    draw += ["--seed", plan.seed, "--train-scenes", LABELLED_SCENES]
    pretrain = [own_file("pretrain/main.py"), plan.images, "--recipe", plan.recipe]
    pretrain += ["--output", plan.pretrain_folder, "--seed", plan.seed]
    drawing = script_job(JobFolder("draw", plan.images.parent), draw, seconds=10)
    pretraining = script_job(JobFolder("pretrain", plan.pretrain_folder), pretrain, seconds=210)
    return [drawing, pretraining] if plan.embedded else [pretraining]


def detector_slots(plan: Quickstart) -> list[Slot]:
    """See `gpu_slots`; on a CPU, two at a time of one thread end before one at a time of two."""
    return gpu_slots(plan.settings.gpus, min(cores(), len(plan.runs()), MOST_AT_A_TIME))


def run(plan: Quickstart) -> Path:
    """Do everything; returns the path of report.html.

    Raises:
        UserError: the output folder cannot be used, or a detector failed.
        JobFailed: drawing, pretraining or the conversion failed.
    """
    begun = time.monotonic()
    prepare_output(plan.output)
    prepared = preparation(plan)
    run_in_order(prepared)
    convert({"moco": plan.checkpoint}, plan.output)
    detectors = [plan.settings.job(run) for run in plan.runs()]
    failed = run_side_by_side(detectors, detector_slots(plan))
    if failed:
        names = ", ".join(job.name for job in failed)
        raise UserError(f"{len(failed)} detectors failed, as is said above: {names}")
    pairs = draw_pairs(plan)
    results = collect(plan, prepared, time.monotonic() - begun)
    return write_report(results, pairs, plan.output)
