"""The dataset doctor: everything that is wrong with the data sets of a config, before a run.

The readers of `moco_det.datasets` tell a `Problems` what they find. A run's stops at the first
thing that cannot be used, and passes over what is left out, such as a box without area; the doctor
hands them its `Report`, which collects all of it. So it has no checks of files of its own, but that
it decodes images. Checks of a config's keys belong in `moco_det.config.checks`.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from moco_det.common.documents import shortened
from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, read_upright
from moco_det.config.checks import (
    check_dataset,
    check_keypoints,
    check_learnable,
    rehearse_scoring,
    wanted_of,
)
from moco_det.datasets import (
    BUILT_IN,
    KINDS,
    NOTHING,
    BuiltIn,
    CityscapesDataset,
    CocoDataset,
    Dataset,
    Location,
    MappedDataset,
    Problem,
    Problems,
    Record,
    data_root,
    get_dataset,
    locate,
)
from moco_det.datasets.cityscapes import read_record
from moco_det.datasets.dataset import (
    ListedImage,
    check_images,
    evenly_spaced,
    size_problem,
)
from moco_det.datasets.problems import DatasetError, one_line
from moco_det.densepose import body


@dataclass
class Report(Problems):
    """What the readers find in one data set, collected.

    `images` and `objects`: how many are listed; None where that could not be found out.

    `official`: what the set should hold, if it is an official one. `notes` are worth knowing but
    not problems.
    """

    name: str
    official: BuiltIn | None = None
    images: int | None = None
    objects: int | None = None
    classes: int | None = None
    decoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    known: set[Problem] = field(default_factory=set, repr=False)

    @property
    def remedy(self) -> str:
        """What to download from whom, and where to put it; "" for a user's own data."""
        if self.official is None:
            return ""
        root = data_root()
        parts = (
            f"{', '.join(source.files)} from {source.site}: {source.placing.format(root=root)}"
            for source in self.official.sources
        )
        return (
            f"download {'; '.join(parts)}. {root} is the data root; DETECTRON2_DATASETS names "
            "another"
        )

    def refuse(self, check: str, text: object) -> None:
        """Add a problem, unless it is known: classes and records are read from the same files."""
        problem = Problem(check, one_line(text))
        if problem not in self.known:
            self.known.add(problem)
            self.problems.append(problem)

    flaw = refuse

    def repeated(self, ids: dict[Any, int]) -> None:
        if ids and self.official and self.official.repeats:
            self.note(f"{len(ids)} annotations are listed more than once, as in the official file")
            return
        for annotation_id, times in ids.items():
            self.refuse("list", f"annotation {annotation_id} is listed {times} times")

    def note(self, text: object) -> None:
        self.notes.append(one_line(text))

    def listed(self, images: int, objects: int | None = None) -> None:
        self.images, self.objects = images, objects

    def lacks(self, paths: Iterable[Path]) -> bool:
        """Report each of `paths` that does not exist; return whether any is missing."""
        missing = [path for path in paths if not path.exists()]
        for path in missing:
            self.refuse("layout", f"{path} does not exist")
        return bool(missing)


# -- all checks of all data sets of a config -------------------------------------------------------


def examine(cfg, limit: int | None) -> list[Report]:
    """Check every data set of DATASETS.TRAIN and DATASETS.TEST against its files and the model.

    Args:
        cfg: says which data sets, and what the model learns from them.
        limit: images and maps of each set that are decoded; None for all. Whether they
            exist, and all other annotations, is checked for every image.

    Raises:
        UserError: the config names no data set.
    """
    names = tuple(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set")
    reports = [Report(name, BUILT_IN.get(name)) for name in names]
    datasets = [_examine_one(cfg, report, limit) for report in reports]
    _compare_classes(reports, datasets)
    return reports


def _examine_one(cfg, report: Report, limit: int | None) -> Dataset | None:
    """Fill one report; the data set, if it can be opened."""
    try:
        location = locate(report.name)
    except UserError as error:
        report.refuse("name", error)
        return None
    dataset, records = _read(cfg, location, report, limit)
    if location.kind == "densepose" and cfg.MODEL.DENSEPOSE_ON:
        _check_body_files(cfg, report)
    if report.official:
        _check_counts(report.official, report)
    if dataset is not None:
        _check_against_model(cfg, dataset, report)
        _check_use(cfg, dataset, records, report)
    return dataset


def _read(
    cfg, location: Location, report: Report, limit: int | None
) -> tuple[Dataset | None, list[Record]]:
    """Open the data set and read it as a run does, problems going to the report."""
    kind, second = KINDS[location.kind], location.second
    parts = (Path(second).expanduser(), ()) if issubclass(kind, CocoDataset) else (second,)
    if report.lacks(kind(report.name, (), location.first, *parts).required):
        return None, []
    try:
        dataset = get_dataset(report.name, report)
        records = _read_records(cfg, dataset, report, limit)
    except DatasetError as error:
        report.refuse(error.check, error)
        return None, []
    except UserError as error:
        report.refuse("annotation", error)
        return None, []
    _decode_images(check_images(records, report), report, limit)
    return dataset, records


def _check_use(cfg, dataset: Dataset, records: list[Record], report: Report) -> None:
    """Whether what is read can be learned from, and scored; asked where nothing else is wrong."""
    is_sample = isinstance(dataset, CityscapesDataset) and len(records) != report.images
    learns = report.name in cfg.DATASETS.TRAIN and not isinstance(dataset, MappedDataset)
    if learns and not is_sample and not report.problems:
        _tell(report, "annotation", check_learnable, cfg, records, (report.name,))
    if report.name in cfg.DATASETS.TEST and records and not report.problems:
        _tell(report, "scoring", rehearse_scoring, cfg, dataset, records)


def _tell(report: Report, check: str, function, *arguments) -> None:
    """Call a function; what it raises is a problem."""
    try:
        function(*arguments)
    except UserError as error:
        report.refuse(check, error)


def _read_records(cfg, dataset: Dataset, report: Report, limit: int | None) -> list[Record]:
    """The records; of maps, which take long to read, `limit`."""
    if isinstance(dataset, CityscapesDataset):
        records = []
        for pair in evenly_spaced(dataset.pairs(report), limit):
            _tell(report, "labels", lambda pair: records.append(read_record(pair)), pair)
        return records
    wanted = wanted_of(cfg) if report.name in cfg.DATASETS.TRAIN else NOTHING
    records = dataset.records(report, wanted)
    if isinstance(dataset, MappedDataset):
        kind = "depth" if dataset.evaluator == "depth" else "labels"
        for record in evenly_spaced(records, limit):
            _tell(report, kind, dataset.read_map, record)
    return records


def _decode_images(images: Sequence[ListedImage], report: Report, limit: int | None) -> None:
    """Decode `limit`, evenly spaced over the set (None: all)."""
    chosen = evenly_spaced(images, limit)
    report.decoded = len(chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for problem in filter(None, threads.map(_image_problem, chosen)):
            report.refuse(*problem)


def _image_problem(image: ListedImage) -> Problem | None:
    try:
        width, height = read_upright(image.path).size
    except UnreadableImage as error:
        return Problem("image", f"{image.path} cannot be decoded: {error.reason}")
    size = height, width
    return None if image.size == size else size_problem(image, size)


def _check_body_files(cfg, report: Report) -> None:
    """The files of the template body that training and scoring on this set read."""
    needed = []
    if report.name in cfg.DATASETS.TRAIN and cfg.INPUT.RANDOM_FLIP == "horizontal":
        needed.append(body.SYMMETRIES)
    if report.name in cfg.DATASETS.TEST:
        needed += body.GEODESICS
    for path in body.missing(needed):
        report.refuse("files", f"{path} does not exist: download {body.SITE}{path.name}")


def _check_counts(official: BuiltIn, report: Report) -> None:
    """Compare the counts with the official ones; known flaws of the official file are excused."""
    for found, wanted, what in (
        (report.images, official.images, "images"),
        (report.objects, official.objects, "annotations"),
    ):
        if None not in (found, wanted) and found != wanted:
            report.refuse("count", f"{found:,} {what}; the official set has {wanted:,}")
    flaws = [problem for problem in report.problems if problem.check == "area"]
    if flaws and len(flaws) == official.flaws:
        report.problems = [problem for problem in report.problems if problem.check != "area"]
        report.notes.append(
            f"{len(flaws)} boxes have no area, as in the official file; they are left out"
        )


def _check_against_model(cfg, dataset: Dataset, report: Report) -> None:
    """Report what the model cannot learn from the data set."""
    report.classes = len(dataset.classes)
    _tell(report, "classes", check_dataset, cfg, dataset)
    if cfg.MODEL.MASK_ON and dataset.evaluator == "voc":
        report.refuse("mask", "PASCAL VOC's layout has no masks, but MODEL.MASK_ON is True")
    _tell(report, "keypoints", check_keypoints, cfg, dataset)


def _compare_classes(reports: list[Report], datasets: list[Dataset | None]) -> None:
    opened = [(r, d) for r, d in zip(reports, datasets, strict=True) if d is not None]
    for report, dataset in opened[1:]:
        first = opened[0][1]
        if dataset.classes != first.classes:
            report.refuse("classes", f"its classes are not those of {first.name}, in this order")


# -- for people ------------------------------------------------------------------------------------


def describe(report: Report, listed: int) -> str:
    """The problems by kind, at most `listed` of each kind (0: all), the remedy and the notes."""
    lines = [f"{shortened(report.name)}: {len(report.problems)} problem(s)"]
    for check in dict.fromkeys(problem.check for problem in report.problems):
        texts = [problem.text for problem in report.problems if problem.check == check]
        shown = texts[: listed or None]
        lines += [f"  {check}: {text}" for text in shown]
        if len(texts) > len(shown):
            lines.append(f"  {check}: and {len(texts) - len(shown)} more")
    if report.problems and report.remedy:
        lines.append(f"  remedy: {report.remedy}")
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)


def table(reports: Sequence[Report]) -> str:
    """One row for each data set; - for what could not be found out or has no official number."""
    headers = ["data set", "images", "official", "objects", "classes", "decoded", "problems"]
    rows = [
        (
            shortened(report.name),
            report.images,
            report.official and report.official.images,
            report.objects,
            report.classes,
            report.decoded,
            len(report.problems) or "none",
        )
        for report in reports
    ]
    return tabulate(rows, headers, "pipe", missingval="-", colalign=("left",) + ("right",) * 6)
