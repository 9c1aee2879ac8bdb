"""The main job as a chain of this project's own commands: draw, pretrain, convert, fine-tune.

What a run leaves in its folder:

    data/                      the drawn data set, unless the user has brought one
    pretrain/                  checkpoint_last.pth.tar, metrics.jsonl
    moco_backbone.pkl          the converted backbone
    detector_<start>_seed<n>/  metrics.json, inference/*.json; <start>: moco, random
    quickstart.log             all that was printed
    report.html, report.json
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco_det.benchmark import outcome, procedural_images
from moco_det.benchmark.report import write_report
from moco_det.benchmark.steps import Step, run_steps
from moco_det.datasets import get_dataset
from moco_det.errors import UserError

STARTS = ("moco", "random")
MARK = ".quickstart"  # a folder that holds this file was made by a quickstart

# Seconds on two CPU cores with the embedded data; only the first guess of the ETA.
EXPECTED = {"draw": 15, "pretrain": 210, "convert": 8, "fine-tune": 80}


@dataclass(frozen=True)
class Plan:
    """What to run on what. `train` and `test` are data set names as `get_dataset` takes them."""

    repository: Path
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
    def backbone(self) -> Path:
        return self.output / "moco_backbone.pkl"

    @property
    def detector_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def detector_folder(self, start: str, seed: int) -> Path:
        return self.output / f"detector_{start}_seed{seed}"


def make_plan(
    repository: Path,
    output: Path,
    recipe: Path,
    config_file: Path,
    seed: int,
    seeds: int,
    images: Path | None = None,
    voc: Path | None = None,
) -> Plan:
    """Check what can be checked before minutes are spent. Raises UserError.

    Args:
        repository: folder that holds pretrain/, tools/ and configs/.
        images, voc: the user's data, both or neither; neither: the embedded data set.
        seed: of drawing, pretraining and the first pair of detectors; later pairs count up.
    """
    if seeds < 1 or seed < 0:
        raise UserError("--seeds must be at least 1, and --seed at least 0")
    if (images is None) != (voc is None):
        raise UserError("--images and --voc go together: unlabelled images, and annotated ones")
    for path in (recipe, config_file):
        if not path.is_file():
            raise UserError(f"{path} is not a file")
    output = output.resolve()
    embedded = images is None
    if embedded:
        images, voc, splits = output / "data/images", output / "data/scenes", ("train", "test")
        classes = procedural_images.CLASSES
    else:
        images, voc = images.resolve(), voc.resolve()
        if not images.is_dir():
            raise UserError(f"--images {images} is not a folder")
        splits = voc_splits(voc)
        classes = get_dataset(f"voc:{voc}:{splits[1]}").classes
    train, test = (f"voc:{voc}:{split}" for split in splits)
    where = {"repository": repository, "output": output, "recipe": recipe.resolve()}
    return Plan(
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

    Raises UserError for a folder that holds anything else, so that nothing of the user's is lost.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        ours = (output / MARK).exists()
        if not ours and any(output.iterdir()):
            raise UserError(f"--output {output} holds other files: name a new or an empty folder")
        (output / MARK).write_text("Made by tools/quickstart.py; its next run starts afresh.\n")
        for folder in [output / "data", output / "pretrain", *output.glob("detector_*_seed*")]:
            if folder.is_dir():
                shutil.rmtree(folder)
        for file in output.glob("report.*"):
            file.unlink()
    except OSError as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror}") from error


def steps_of(plan: Plan) -> list[Step]:
    """The chain of commands, each as one would type it."""
    draw = ["-m", "moco_det.benchmark.procedural_images", "--output", plan.images.parent]
    pretrain = [plan.repository / "pretrain/main.py", plan.images, "--recipe", plan.recipe]
    pretrain += ["--output", plan.pretrain_folder, "--seed", plan.seed]
    checkpoint = plan.pretrain_folder / "checkpoint_last.pth.tar"
    convert = [plan.repository / "tools/convert_to_d2.py", checkpoint, plan.backbone]
    return [
        *([_step("draw", "draw", [*draw, "--seed", plan.seed])] if plan.embedded else []),
        _step("pretrain", "pretrain", pretrain),
        _step("convert", "convert", convert),
        *(_detector_step(plan, start, seed) for seed in plan.detector_seeds for start in STARTS),
    ]


def _detector_step(plan: Plan, start: str, seed: int) -> Step:
    """Fine-tune and evaluate one detector; `start` changes its first weights and nothing else."""
    settings = {
        "DATASETS.TRAIN": (plan.train,),
        "DATASETS.TEST": (plan.test,),
        "MODEL.WEIGHTS": plan.backbone if start == "moco" else "",
        "MODEL.ROI_HEADS.NUM_CLASSES": len(plan.classes),
        "OUTPUT_DIR": plan.detector_folder(start, seed),
        "SEED": seed,
    }
    options = [word for pair in settings.items() for word in pair]
    script = [plan.repository / "tools/train_net.py", "--engine", "native"]
    command = [*script, "--config-file", plan.config_file, *options]
    return _step(f"fine-tune from {start}, seed {seed}", "fine-tune", command)


def _step(name: str, kind: str, arguments: Sequence[object]) -> Step:
    return Step(name, kind, [sys.executable, *map(str, arguments)], EXPECTED[kind])


def run(plan: Plan) -> Path:
    """Do everything; returns the path of report.html.

    Raises:
        UserError: the output folder cannot be used.
        StepFailed: a command of the chain failed.
    """
    begun = time.monotonic()
    prepare_output(plan.output)
    steps = steps_of(plan)
    durations = run_steps(steps, plan.output / "quickstart.log")
    results = outcome.collect(plan, steps, durations)
    try:
        pairs = outcome.draw_pairs(plan)
    except UserError as error:  # the numbers are worth a report without pictures too
        print(f"warning: the report has no pictures: {error}", flush=True)
        pairs = []
    results["seconds"] = round(time.monotonic() - begun, 1)
    return write_report(results, pairs, plan.output)
