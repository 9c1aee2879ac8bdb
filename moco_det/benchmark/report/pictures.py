"""The pictures of a report: test images with their annotations and what detectors found.

Two kinds, of images at even distances through the test list. `sample_pictures` shows each row of a
reproduction beside the annotations, for every task, as `moco_det.visualize` draws them. A
`judged_picture` says of every detected box whether AP50 counts it as right; it is an `<svg>` over
the image, where right and wrong differ in line style and in the label's first sign too, so that
they are not left to colour alone.
"""

import base64
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image

from moco_det import visualize
from moco_det.benchmark.jobs.grid import Experiment, Run
from moco_det.benchmark.jobs.job import FINISHED
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report.pages import render
from moco_det.common.documents import read_mapping
from moco_det.common.errors import UserError
from moco_det.datasets import Dataset, Record, get_dataset
from moco_det.evaluation.predictions import predictions_file, read_predictions

SCORE_SHOWN = 0.3  # detections below this score are left out
SAMPLES = 4  # images of an experiment
SAMPLE_SIDE = 320  # pixels of the longer side of a sample, at most
SMALLEST_SIDE = 256  # smaller images are enlarged before objects are drawn on them
JUDGED_SIDE = 480  # pixels of the longer side of the image in a judged picture, at most


def evenly_spaced(records: Sequence[Record], count: int) -> list[Record]:
    """At most `count` records, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(records) - 1, count).round().astype(int))
    return [records[index] for index in chosen]


def jpeg_uri(picture: Tensor, side: int, quality: int) -> str:
    """The picture as a JPEG of at most `side` pixels a side, in a data URI."""
    image, file = to_pil_image(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


# -- samples of every task ------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A JPEG as a data URI, and the row whose run it shows; None: the annotations."""

    image_id: str
    row: str | None
    uri: str


def sample_pictures(runs: Sequence[Run], settings: Settings) -> dict[str, list[list[Sample]]]:
    """Name of each experiment -> `samples_of`; prints a warning where it cannot be had."""
    pictures = {}
    for experiment in {run.experiment.name: run.experiment for run in runs}.values():
        try:
            pictures[experiment.name] = samples_of(experiment, runs, settings)
        except UserError as error:  # the numbers are worth a report without pictures too
            print(f"warning: no pictures of {experiment.name}: {error}", flush=True)
    return pictures


def samples_of(
    experiment: Experiment, runs: Sequence[Run], settings: Settings
) -> list[list[Sample]]:
    """For each of `SAMPLES` test images the annotations and what each row's first trial found.

    Rows whose predictions cannot be read are left out, with a warning. Empty where no run of the
    experiment is finished.

    Raises:
        UserError: the test images, or all predictions, are no longer there.
    """
    folders: dict[str, Path] = {}
    for run in runs:
        folder = settings.folder(run)
        wanted = run.experiment == experiment and run.row not in folders
        with contextlib.suppress(UserError):  # of a damaged record, which the report names
            if wanted and folder.state() == FINISHED:
                folders[run.row] = folder.path
    if not folders:
        return []
    dataset, found, problems = None, {}, {}
    for row, folder in folders.items():
        try:
            dataset = dataset or get_dataset(first_test_set(folder))
            found[row] = read_predictions(predictions_file(folder, dataset.name), dataset)
        except UserError as error:
            problems[row] = error
    if not found:
        raise next(iter(problems.values()))
    for row, error in problems.items():  # the other rows have their pictures
        print(f"warning: no pictures of {experiment.name}, {row}: {error}", flush=True)
    classes = (*experiment.classes, *dataset.classes[len(experiment.classes) :])
    records = evenly_spaced(dataset.records(), SAMPLES)
    return [_samples(record, dataset, found, classes) for record in records]


def first_test_set(folder: Path) -> str:
    """The first of DATASETS.TEST in a run's config.yaml. Raises UserError where there is none."""
    datasets = read_mapping(folder / "config.yaml", "config").get("DATASETS")
    names = datasets.get("TEST") if isinstance(datasets, dict) else None
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise UserError(f"config {folder / 'config.yaml'} lacks DATASETS.TEST")
    return names[0]


def _samples(
    record: Record, dataset: Dataset, found: Mapping[str, Mapping], classes: Sequence[str]
) -> list[Sample]:
    image, image_id = visualize.read_image(record), str(record["image_id"])
    scale = max(1, round(SMALLEST_SIDE / max(image.shape[1:])))
    pictures = {None: visualize.draw_annotations(image, record, dataset, classes, scale)}
    for row, predictions in found.items():
        pictures[row] = image
        if image_id in predictions:
            pictures[row] = visualize.draw_prediction(
                image, predictions[image_id], dataset, SCORE_SHOWN, classes, scale
            )
    return [
        Sample(image_id, row, jpeg_uri(picture, SAMPLE_SIDE, quality=80))
        for row, picture in pictures.items()
    ]


# -- boxes, right and wrong -----------------------------------------------------------------------


@dataclass(frozen=True)
class Boxes:
    """`boxes` (N, 4), XYXY in pixels of the image, and `classes` (N,); `scores` (N,) in [0, 1] for
    detections only."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None

    @classmethod
    def annotated(cls, record: Record) -> "Boxes":
        found = record["annotations"]
        boxes = np.array([annotation["bbox"] for annotation in found], np.float32).reshape(-1, 4)
        return cls(boxes, np.array([annotation["category_id"] for annotation in found], np.int64))

    @classmethod
    def predicted(cls, prediction: Mapping[str, Any]) -> "Boxes":
        """Those with a score of `SCORE_SHOWN` or more."""
        fields = [np.asarray(prediction[key]) for key in ("boxes", "classes", "scores")]
        shown = fields[-1] >= SCORE_SHOWN
        return cls(*(field[shown] for field in fields))


def matched(detections: Boxes, targets: Boxes, iou_threshold: float = 0.5) -> np.ndarray:
    """Which detections are right, (N,) bool: the rule of AP50.

    In descending order of score each takes the unclaimed target of its class with the largest IoU,
    if that reaches `iou_threshold`; a second detection of one object is therefore wrong.
    """
    right = np.zeros(len(detections.boxes), bool)
    if not len(detections.boxes) or not len(targets.boxes):
        return right
    boxes = (torch.as_tensor(each.boxes, dtype=torch.float32) for each in (detections, targets))
    iou = box_iou(*boxes).numpy()
    iou[detections.classes[:, None] != targets.classes[None, :]] = -1.0
    for index in np.argsort(-detections.scores, kind="stable"):
        best = iou[index].argmax()
        if iou[index, best] >= iou_threshold:
            right[index] = True
            iou[:, best] = -1.0
    return right


def in_words(right: np.ndarray, targets: Boxes) -> str:
    """For example "3 of 4 objects found, 1 false detection"."""
    false = int((~right).sum())
    plural = "" if false == 1 else "s"
    return (
        f"{int(right.sum())} of {len(targets.boxes)} objects found, {false} false detection{plural}"
    )


@dataclass(frozen=True)
class JudgedPicture:
    """An `<svg>`, and how many objects it shows as found."""

    svg: Markup
    words: str


def judged_picture(
    record: Record, prediction: Mapping[str, Any], classes: Sequence[str], label: str
) -> JudgedPicture:
    """The image with its annotated boxes (dashed) and the shown detections (solid).

    `label` begins the description for those who do not see it.
    """
    image = visualize.read_image(record)
    height, width = image.shape[1:]
    targets, shown = Boxes.annotated(record), Boxes.predicted(prediction)
    right = matched(shown, targets)
    font_size = max(width, height) / 20
    marks = []
    # The surest last, so that its label lies on top.
    for index in np.argsort(shown.scores, kind="stable"):
        style, sign = ("right", "") if right[index] else ("wrong", "✕ ")
        text = f"{sign}{classes[shown.classes[index]]} {shown.scores[index]:.0%}"
        box = shown.boxes[index]
        plate = _plate(box, text, font_size, width, height)
        marks.append({"box": box, "style": style, "text": text, "plate": plate})
    words = in_words(right, targets)
    svg = render(
        "judged_picture.svg.j2",
        label=f"{label}: {words}", width=width, height=height, font_size=font_size,
        uri=jpeg_uri(image, JUDGED_SIDE, quality=88), targets=targets.boxes, marks=marks,
    )  # fmt: skip
    return JudgedPicture(svg, words)


def _plate(
    box: np.ndarray, text: str, font_size: float, width: int, height: int
) -> tuple[float, float, float, float]:
    """Where the label of a box is written: x, y, width, height.

    Above the box, or inside its upper edge, and always within the image.
    """
    breadth = (0.53 * len(text) + 0.6) * font_size
    x = min(max(float(box[0]), 0.0), max(width - breadth, 0.0))
    y = float(box[1]) - 1.25 * font_size
    return x, y if y >= 0 else max(float(box[1]), 0.0), breadth, 1.25 * font_size
