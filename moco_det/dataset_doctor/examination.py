"""All checks of all data sets that a config names."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moco_det.common.errors import UserError
from moco_det.common.images import UnreadableImage, read_upright
from moco_det.config.checks import check_dataset
from moco_det.dataset_doctor.coco import check_coco
from moco_det.dataset_doctor.folders import check_label_maps, check_voc, evenly_spaced
from moco_det.dataset_doctor.report import ListedImage, Problem, Report
from moco_det.datasets import (
    BUILT_IN,
    KINDS,
    BuiltIn,
    CocoDataset,
    Dataset,
    Location,
    VocDataset,
    get_dataset,
    locate,
)
from moco_det.densepose import body


def examine(cfg, limit: int | None) -> list[Report]:
    """Check every data set of DATASETS.TRAIN and DATASETS.TEST against its files and the model.

    Args:
        cfg: says which data sets, and what the model learns from them.
        limit: images and label maps of each set that are decoded; None for all. Whether they
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
        report.problem("name", error)
        return None
    _check_images(check_files(cfg, location, report, limit), report, limit)
    if location.kind == "densepose" and cfg.MODEL.DENSEPOSE_ON:
        _check_body_files(cfg, report)
    if report.official:
        _check_counts(report.official, report)
    if report.images is None:
        return None  # files are missing, and that is reported
    return _check_against_model(cfg, location, report)


def check_files(cfg, location: Location, report: Report, limit: int | None) -> list[ListedImage]:
    """Check the layout and the annotations; return the images that these list."""
    kind, second = KINDS[location.kind], location.second
    is_coco = issubclass(kind, CocoDataset)
    parts = (Path(second).expanduser(), ()) if is_coco else (second,)
    files = kind(report.name, (), location.first, *parts)  # its classes are not known yet
    if report.lacks(files.required):
        return []
    if is_coco:
        return check_coco(files, report, masks=cfg.MODEL.MASK_ON)
    if isinstance(files, VocDataset):
        return check_voc(files, report)
    return check_label_maps(files, report, limit)


def _check_images(images: Sequence[ListedImage], report: Report, limit: int | None) -> None:
    """Look for all of them; decode `limit`, evenly spaced over the set (None: all)."""
    present, absent = [], []
    for image in images:
        (present if image.path.is_file() else absent).append(image)
    if images and not present:
        report.problem(
            "layout", f"none of the {len(images):,} images exists; expected {images[0].path}"
        )
        return
    for image in absent:
        report.problem("image", f"{image.path} does not exist")
    chosen = evenly_spaced(present, limit)
    report.decoded = len(chosen)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        report.problems += filter(None, threads.map(_image_problem, chosen))


def _image_problem(image: ListedImage) -> Problem | None:
    try:
        width, height = read_upright(image.path).size
    except UnreadableImage as error:
        return Problem("image", f"{image.path} cannot be decoded: {error.reason}")
    if image.size in (None, (height, width)):
        return None
    stated = f"{image.size[1]}x{image.size[0]}"
    text = f"{image.path} is {width}x{height} pixels, its annotation says {stated}"
    return Problem("size", text)


def _check_body_files(cfg, report: Report) -> None:
    """The files of the template body that training and scoring on this set read."""
    needed = []
    if report.name in cfg.DATASETS.TRAIN and cfg.INPUT.RANDOM_FLIP == "horizontal":
        needed.append(body.SYMMETRIES)
    if report.name in cfg.DATASETS.TEST:
        needed += body.GEODESICS
    for path in body.missing(needed):
        report.problem("files", f"{path} does not exist: download {body.SITE}{path.name}")


def _check_counts(official: BuiltIn, report: Report) -> None:
    """Compare the counts with the official ones; known flaws of the official file are excused."""
    for found, wanted, what in (
        (report.images, official.images, "images"),
        (report.objects, official.objects, "annotations"),
    ):
        if None not in (found, wanted) and found != wanted:
            report.problem("count", f"{found:,} {what}; the official set has {wanted:,}")
    flaws = [problem for problem in report.problems if problem.check == "area"]
    if flaws and len(flaws) == official.flaws:
        report.problems = [problem for problem in report.problems if problem not in flaws]
        report.notes.append(
            f"{len(flaws)} boxes have no area, as in the official file; they are left out"
        )


def _check_against_model(cfg, location: Location, report: Report) -> Dataset | None:
    """Open the data set as a run does; report what the model cannot learn from it."""
    try:
        dataset = get_dataset(report.name)
    except UserError as error:
        report.problem("version" if location.kind == "lvis" else "classes", error)
        return None
    report.classes = len(dataset.classes)
    try:
        check_dataset(cfg, dataset)
    except UserError as error:
        report.problem("classes", error)
    if cfg.MODEL.MASK_ON and dataset.evaluator == "voc":
        report.problem("mask", "PASCAL VOC's layout has no masks, but MODEL.MASK_ON is True")
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, dataset, report)
    return dataset


def _check_keypoints(wanted: int, dataset: Dataset, report: Report) -> None:
    found = len(dataset.keypoint_names)
    if found != wanted:
        report.problem(
            "keypoints",
            f"the annotations name {found} keypoints, MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is "
            f"{wanted}",
        )


def _compare_classes(reports: list[Report], datasets: list[Dataset | None]) -> None:
    opened = [(r, d) for r, d in zip(reports, datasets, strict=True) if d is not None]
    for report, dataset in opened[1:]:
        first = opened[0][1]
        if dataset.classes != first.classes:
            report.problem("classes", f"its classes are not those of {first.name}, in this order")
