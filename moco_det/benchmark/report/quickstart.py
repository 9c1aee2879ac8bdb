"""The report of a quickstart: one detector from MoCo beside one from random weights.

`collect` reads what the steps have left, `write_report` writes it for people (report.html) and for
programs (report.json). AP and top-1 are in percent, times in seconds.
"""

import json
import operator
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moco_det.benchmark.jobs.job import Job, JobFolder, environment
from moco_det.benchmark.jobs.runs import RunFolder
from moco_det.benchmark.report import pages
from moco_det.benchmark.report.pages import Points, render
from moco_det.benchmark.report.tables import SIGNIFICANT
from moco_det.benchmark.significance import Difference, Summary, difference_of_trials
from moco_det.common.documents import read_json_lines
from moco_det.common.errors import UserError
from moco_det.common.files import write_text
from moco_det.datasets import Record, get_dataset
from moco_det.evaluation.predictions import predictions_file, read_predictions

METRICS = {
    "AP50": "AP50: a box counts when it overlaps the true one by half",
    "AP": "AP: mean over overlaps from 0.50 to 0.95",
    "AP75": "AP75: overlap of three quarters",
}
PICTURES = 8  # test images

PicturePair = Mapping[str, pages.JudgedPicture]  # start -> its detector on one image


# -- what is known of a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pretraining:
    """Curves over epochs: `loss` as logged, `knn` the monitor's top-1 accuracy.

    Epoch 0 of `knn` is the random encoder; it is empty where there are no validation labels.
    `knn_chance`: what guessing among the classes reaches; None: unknown.
    """

    loss: Points
    chance_loss: float
    knn: Points
    knn_chance: float | None = None


@dataclass(frozen=True)
class DetectorPair:
    """The detectors of one seed, which differ in their first weights only: {AP, AP50, AP75}."""

    seed: int
    random: Mapping[str, float]
    moco: Mapping[str, float]


@dataclass(frozen=True)
class Results:
    """Everything the report says.

    Args:
        seconds: of the whole run.
        data: label -> text, what was trained and tested on.
        detection_loss: "random", "moco" -> the curve of each seed, (iteration, loss).
        steps: {name, command, seconds} of each.
        environment: label -> text.
        settings: name of a settings file -> its text.
    """

    title: str
    created: str
    seconds: float
    data: Mapping[str, str]
    pretraining: Pretraining
    detection: Sequence[DetectorPair]
    detection_loss: Mapping[str, Sequence[Points]]
    steps: Sequence[Mapping[str, Any]]
    environment: Mapping[str, str]
    settings: Mapping[str, str]

    def comparison(self, metric: str) -> "PairedComparison":
        return PairedComparison(
            random_trials=tuple(pair.random[metric] for pair in self.detection),
            moco_trials=tuple(pair.moco[metric] for pair in self.detection),
        )

    def rows(self, metric: str) -> list[tuple[str, float, float]]:
        """(name, random, MoCo) of each seed and, of several, of their mean."""
        rows = [(f"seed {p.seed}", p.random[metric], p.moco[metric]) for p in self.detection]
        if len(rows) > 1:
            means = self.comparison(metric)
            rows.append(("mean", means.random, means.moco))
        return rows

    @property
    def detection_lines(self) -> list[tuple[str, Points]]:
        """(start, curve of the loss) of each detector that has logged one."""
        starts = ("random", "moco")
        return [(start, run) for start in starts for run in self.detection_loss[start] if run]

    @property
    def knn_top1(self) -> dict[str, float | None]:
        """{random, moco}: the monitor's first and last values; None where it did not run."""
        curve = self.pretraining.knn
        first, last = (curve[0][1], curve[-1][1]) if curve else (None, None)
        return {"random": first, "moco": last}


@dataclass(frozen=True)
class PairedComparison:
    """One metric of all seeds' detectors, those from random weights and those from MoCo's."""

    random_trials: tuple[float, ...]
    moco_trials: tuple[float, ...]

    @property
    def random(self) -> float:
        return self.random_summary.mean

    @property
    def moco(self) -> float:
        return self.moco_summary.mean

    @property
    def random_summary(self) -> Summary:
        return Summary.of(self.random_trials)

    @property
    def moco_summary(self) -> Summary:
        return Summary.of(self.moco_trials)

    @property
    def gain(self) -> Difference:
        """Of the means, judged as every difference of a reproduction is."""
        return difference_of_trials(self.moco_trials, self.random_trials)

    @property
    def difference(self) -> float:
        return self.moco - self.random

    @property
    def differences(self) -> tuple[float, ...]:
        """MoCo's lead in each seed."""
        return tuple(map(operator.sub, self.moco_trials, self.random_trials))

    @property
    def difference_sd(self) -> float | None:
        """Sample standard deviation of the differences; None of a single seed."""
        return Summary.of(self.differences).sd


# -- from the files of a finished run -------------------------------------------------------------


def collect(plan, prepared: Sequence[Job], seconds: float) -> Results:
    """What a finished run has left on disk.

    Args:
        plan: a `jobs.quickstart.Quickstart`.
        prepared: what was run before the detectors.
        seconds: of the whole run.

    Raises:
        UserError: a file lacks a number that it should hold.
    """
    folders = _detector_folders(plan)
    detectors = [folder for each in folders.values() for folder in each]
    return Results(
        title="From unlabelled images to a detection AP",
        created=pages.now(),
        seconds=round(seconds, 1),
        data=_data(plan),
        pretraining=read_pretraining(plan.pretrain_folder / "metrics.jsonl", plan.images),
        detection=[
            DetectorPair(seed, random=read_ap(random), moco=read_ap(moco))
            for seed, random, moco in zip(
                plan.detector_seeds, folders["random"], folders["moco"], strict=True
            )
        ],
        detection_loss={
            start: [folder.losses() for folder in each] for start, each in folders.items()
        },
        steps=[
            *(_step_taken(job.name, job.folder) for job in prepared),
            *(_step_taken(f"fine-tune from {d.run.row}, seed {d.run.trial}", d) for d in detectors),
        ],
        environment=environment(),
        settings={path.name: path.read_text() for path in (plan.recipe, plan.config_file)},
    )


def _detector_folders(plan) -> dict[str, list[RunFolder]]:
    """Start -> the folder of each seed's detector."""
    folders: dict[str, list[RunFolder]] = {}
    for run in plan.runs():
        folders.setdefault(run.row, []).append(plan.settings.folder(run))
    return folders


def _data(plan) -> dict[str, str]:
    train, test = (len(get_dataset(name).records()) for name in (plan.train, plan.test))
    drawn = f"drawn by moco_det.benchmark.synthetic.images from seed {plan.seed}"
    return {
        "Unlabelled images": drawn if plan.embedded else str(plan.images),
        "Annotated images": drawn if plan.embedded else plan.train.split(":", 1)[1],
        "Detector trained on": f"{train} images",
        "Tested on": f"{test} images",
        "Classes": ", ".join(plan.classes),
    }


def read_pretraining(path: Path, images: Path) -> Pretraining:
    """From pretraining's metrics.jsonl; `images`: what it was trained on."""
    lines = read_json_lines(path, "the log", finite=False)
    training = [line for line in lines if "loss" in line]
    return Pretraining(
        loss=[[line["epoch"], line["loss"]] for line in training],
        chance_loss=training[-1]["chance_loss"],
        knn=[[line["epoch"], line["knn_top1"]] for line in lines if "knn_top1" in line],
        knn_chance=_chance(images / "val"),
    )


def _chance(labelled: Path) -> float | None:
    """Top-1 of guessing among the class folders of `labelled`; None where there are none."""
    classes = sum(path.is_dir() for path in labelled.iterdir()) if labelled.is_dir() else 0
    return 100 / classes if classes else None


def read_ap(folder: RunFolder) -> dict[str, float]:
    """{AP, AP50, AP75} in percent of a detector's last evaluation."""
    results = folder.results()
    try:
        return {name: results[f"bbox/{name}"] for name in ("AP", "AP50", "AP75")}
    except KeyError as error:
        path = folder.path / "metrics.json"
        raise UserError(f"{path} holds no {error}: the detector was not evaluated") from error


def _step_taken(name: str, folder: JobFolder) -> dict[str, Any]:
    record = folder.record
    return {"name": name, "command": record["command"], "seconds": round(record["seconds"], 1)}


def draw_pairs(plan) -> list[PicturePair]:
    """Test images at even distances, with what the first seed's detector of each start found.

    Empty, with a warning, where the images or the predictions are no longer there.
    """
    try:
        dataset = get_dataset(plan.test)
        found = {
            start: read_predictions(predictions_file(folders[0].path, dataset.name), dataset)
            for start, folders in _detector_folders(plan).items()
        }
        records = pages.evenly_spaced(dataset.records(), PICTURES)
        return [draw_pair(record, found, dataset.classes) for record in records]
    except UserError as error:  # the numbers are worth a report without pictures too
        print(f"warning: the report has no pictures: {error}", flush=True)
        return []


def draw_pair(record: Record, found: Mapping[str, Mapping], classes: Sequence[str]) -> PicturePair:
    """`found`: start -> image id, as text -> prediction."""
    image_id, pair = str(record["image_id"]), {}
    for start, name in (("moco", "MoCo"), ("random", "Random")):
        label = f"{name}, image {image_id}"
        pair[start] = pages.judged_picture(record, found[start][image_id], classes, label)
    return pair


# -- what is written ------------------------------------------------------------------------------


def write_report(results: Results, pairs: Sequence[PicturePair], folder: Path) -> Path:
    """Write report.json and report.html into `folder`; returns the path of the page."""
    text = json.dumps(as_json(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / "report.json", text + "\n")
    page = folder / "report.html"
    write_text(page, render_page(results, pairs))
    return page


def as_json(results: Results) -> dict:
    """The content of report.json: the results, less the texts of the settings, plus the means."""
    ap50 = results.comparison("AP50")
    gain = ap50.gain
    headline = {
        "seconds": results.seconds,
        "knn_top1": results.knn_top1,
        "ap50": {"random": ap50.random, "moco": ap50.moco},
        "ap50_difference": {
            "mean": ap50.difference,
            "standard_deviation": ap50.difference_sd,
            "n": len(ap50.differences),
            "interval": gain.interval,
            "significant": gain.significant,
        },
        "ap50_summary": {
            "random": asdict(ap50.random_summary),
            "moco": asdict(ap50.moco_summary),
        },
    }
    return headline | {k: v for k, v in asdict(results).items() if k not in ("settings", "seconds")}


def render_page(results: Results, pairs: Sequence[PicturePair]) -> Markup:
    """report.html; without a gallery where there are no `pairs`."""
    return render(
        "quickstart.html.j2",
        title=results.title,
        results=results,
        epoch_means=_epoch_means(results.pretraining.loss),
        metrics=METRICS,
        pairs=pairs,
        score_shown=pages.SCORE_SHOWN,
        mark=SIGNIFICANT,
        commands="\n\n".join(step["command"] for step in results.steps),
    )


def _epoch_means(points: Points) -> list[tuple[float, float]]:
    """Mean loss per epoch, placed at the middle of the epoch; an epoch holds x in (e-1, e]."""
    epochs: dict[int, list[float]] = {}
    for x, loss in points:
        epochs.setdefault(int(-(-x // 1)), []).append(loss)
    return [(epoch - 0.5, statistics.fmean(losses)) for epoch, losses in sorted(epochs.items())]
