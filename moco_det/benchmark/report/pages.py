"""HTML pages and SVG charts from the templates beside this file, without scripts.

Every text is escaped, nothing is fetched. A chart is one inline `<svg role="img">` whose title and
description say in words what it shows. Its colours are classes that report.css sets for light, dark
and paper: `moco`, `random`, `faint`, and `s0` to `s7` for lines of any number of rows. What is
drawn is in the templates *_chart.svg.j2; here is where it lies.
"""

import base64
import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.functional import to_pil_image

from moco_det import visualize
from moco_det.benchmark.jobs.grid import AnyRun, Experiment, Run
from moco_det.benchmark.jobs.job import FINISHED
from moco_det.benchmark.jobs.runs import Settings
from moco_det.benchmark.report import tables
from moco_det.benchmark.significance import signed
from moco_det.common.documents import read_mapping
from moco_det.common.errors import UserError
from moco_det.datasets import Dataset, Record, get_dataset
from moco_det.evaluation.predictions import predictions_file, read_predictions

WIDTH, HEIGHT = 460, 280  # of a line chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 16, 46  # margins around the plotting area

Points = Sequence[tuple[float, float]]


def render(template: str, **values) -> Markup:
    """One of templates/ with these values: a page, or a piece of one that others may hold."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pixels": "{:.1f}".format,
        "number": tables.number_text,
        "signed": signed,
        "difference": tables.difference_text,
        "count": tables.count_text,
        "duration": duration,
    }
    environment.globals |= {"line_chart": line_chart, "dumbbell_chart": dumbbell_chart}
    return environment


def duration(seconds: float) -> str:
    """For example "8 min 05 s", "42 s" or "3 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# -- charts ---------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high], about `count`.

    The first is at most `low`, the last at least `high`.
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """20.0 -> "20", 0.25 -> "0.25", 1500 -> "1,500"."""
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def line_chart(
    title: str,
    description: str,
    lines: Sequence[tuple[str, Points]],
    x_label: str,
    y_label: str,
    references: Sequence[tuple[float, str]] = (),
    percent: bool = False,
    dots: bool = False,
) -> Markup:
    """Draw lines over common axes, x from 0.

    Args:
        lines: the CSS class of each, and its points.
        references: dashed levels, and the name that is written on each.
        percent: keep 0 in the picture, so that a small gain does not look like a large one.
        dots: mark the points.
    """
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points] + [level for level, _ in references]
    y_ticks = nice_ticks(0.0 if percent else min(ys), max(ys))
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    return render(
        "line_chart.svg.j2",
        title=title, description=description, width=WIDTH, height=HEIGHT,
        left=left, right=right, top=top, bottom=bottom,
        x=_scale(0.0, max(xs), left, right),
        y=_scale(y_ticks[0], y_ticks[-1], bottom, top),
        x_ticks=[tick for tick in nice_ticks(0.0, max(xs), 6) if tick <= max(xs)],
        y_ticks=y_ticks, tick_text=tick_text, lines=lines, x_label=x_label, y_label=y_label,
        references=references, dots=dots,
    )  # fmt: skip


def dumbbell_chart(
    title: str, description: str, rows: Sequence[tuple[str, float, float]]
) -> Markup:
    """One row per (name, random, moco): two dots on a common percent scale, joined by a bar."""
    pitch = max(44, (HEIGHT - 52) / len(rows))  # few rows: as tall as a line chart
    ticks = nice_ticks(0.0, max(max(random, moco) for _, random, moco in rows))
    left, right = 74, WIDTH - 50  # room for the names, and for a value beside the last tick
    return render(
        "dumbbell_chart.svg.j2",
        title=title, description=description, width=WIDTH, height=round(pitch * len(rows)) + 52,
        left=left, x=_scale(ticks[0], ticks[-1], left, right), ticks=ticks,
        tick_text=tick_text, rows=rows, pitch=pitch,
    )  # fmt: skip


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map that takes [low, high] to [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


# -- pictures: test images, their annotations and what detectors found -----------------------------
#
# Two kinds, of images at even distances through the test list. `sample_pictures` shows each row of
# a reproduction beside the annotations, for every task, as `moco_det.visualize` draws them. A
# `judged_picture` says of every detected box whether AP50 counts it as right; it is an `<svg>` over
# the image, where right and wrong differ in line style and in the label's first sign too, so that
# they are not left to colour alone.

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


def sample_pictures(runs: Sequence[AnyRun], settings: Settings) -> dict[str, list[list[Sample]]]:
    """Name of each detectors' experiment -> `samples_of`; prints a warning where there is none."""
    pictures, runs = {}, [run for run in runs if isinstance(run, Run)]
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


def now() -> str:
    """The time, as a page shows it: "26 November 2026, 17:05 UTC+01:00"."""
    time = datetime.now().astimezone()
    zone = time.strftime("%z")
    beside = "" if zone == "+0000" else f"{zone[:3]}:{zone[3:5]}"
    return f"{time:%-d %B %Y, %H:%M} UTC{beside}"


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


def thinned(detections: Boxes, right: np.ndarray, iou_threshold: float = 0.5) -> np.ndarray:
    """Indices of the detections to draw: the right ones, and wrong ones that lie on no other.

    Of wrong ones on one place (an IoU of `iou_threshold`, of whatever classes) the surest is drawn.
    """
    order = np.lexsort((-detections.scores, ~right))  # right ones first, then by score
    boxes = torch.as_tensor(detections.boxes, dtype=torch.float32).reshape(-1, 4)
    iou, drawn = box_iou(boxes, boxes).numpy(), []
    for index in order:
        if right[index] or not (iou[index, drawn] >= iou_threshold).any():
            drawn.append(index)
    return np.array(drawn, dtype=int)


def in_words(right: np.ndarray, targets: Boxes, hidden: int = 0) -> str:
    """For example "3 of 4 objects found, 1 false detection"; `hidden` of these are not drawn."""
    false = int((~right).sum())
    plural = "" if false == 1 else "s"
    rest = f", {hidden} of them on others and not drawn" if hidden else ""
    found = f"{int(right.sum())} of {len(targets.boxes)} objects found"
    return f"{found}, {false} false detection{plural}{rest}"


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
    drawn = thinned(shown, right)
    font_size = max(width, height) / 20
    marks = []
    # The surest last, so that its label lies on top.
    for index in drawn[np.argsort(shown.scores[drawn], kind="stable")]:
        style, sign = ("right", "") if right[index] else ("wrong", "✕ ")
        text = f"{sign}{classes[shown.classes[index]]} {shown.scores[index]:.0%}"
        box = shown.boxes[index]
        plate = _plate(box, text, font_size, width, height)
        marks.append({"box": box, "style": style, "text": text, "plate": plate})
    words = in_words(right, targets, hidden=len(right) - len(drawn))
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
