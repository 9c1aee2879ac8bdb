"""All checks of all data sets that a config names."""

from moco_det.common.errors import UserError
from moco_det.config.tasks import check_dataset
from moco_det.dataset_doctor.coco import check_coco
from moco_det.dataset_doctor.label_maps import (
    check_cityscapes,
    check_semantic_cityscapes,
    check_semantic_voc,
)
from moco_det.dataset_doctor.official import COCO_KINDS, Official, Place, find_place, remedy
from moco_det.dataset_doctor.report import Photograph, Report, check_photographs
from moco_det.dataset_doctor.voc import check_voc
from moco_det.datasets import Dataset, get_dataset
from moco_det.densepose import files as densepose_files

_LABEL_MAPS = {
    "voc_sem_seg": check_semantic_voc,
    "cityscapes_sem_seg": check_semantic_cityscapes,
    "cityscapes": check_cityscapes,
}


def examine(cfg, limit: int | None) -> list[Report]:
    """Check every data set of DATASETS.TRAIN and DATASETS.TEST against its files and the model.

    Args:
        cfg: says which data sets, and what the model learns from them.
        limit: photographs and label maps of each set that are decoded; None for all. Whether they
            are there, and all other annotations, is checked of every image.

    Raises:
        UserError: the config names no data set.
    """
    names = tuple(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty: name a data set")
    reports = [Report(name) for name in names]
    datasets = [_examine_one(cfg, report, limit) for report in reports]
    _compare_classes(reports, datasets)
    return reports


def _examine_one(cfg, report: Report, limit: int | None) -> Dataset | None:
    """Fill one report; the data set, if it can be opened."""
    try:
        place = find_place(report.name)
    except UserError as error:
        report.problem("name", error)
        return None
    if place.official:
        report.expected, report.remedy = place.official.images, remedy(place.official)
    photographs = check_files(cfg, place, report, limit)
    check_photographs(report, photographs, limit)
    if place.kind == "densepose" and cfg.MODEL.DENSEPOSE_ON:
        _check_body_files(cfg, report)
    if place.official:
        _check_counts(place.official, report)
    if report.images is None:
        return None  # the layout lacks something, and that is reported
    return _check_against_model(cfg, place, report)


def check_files(cfg, place: Place, report: Report, limit: int | None) -> list[Photograph]:
    """The checks of the layout and the annotations; the photographs that these name."""
    if place.kind == "voc":
        return check_voc(place, report)
    if place.kind in COCO_KINDS:
        return check_coco(place, report, masks=cfg.MODEL.MASK_ON)
    return _LABEL_MAPS[place.kind](place, report, limit)


def _check_body_files(cfg, report: Report) -> None:
    """The files of the template body that training and scoring on this set read."""
    needed = []
    if report.name in cfg.DATASETS.TRAIN and cfg.INPUT.RANDOM_FLIP == "horizontal":
        needed.append(densepose_files.SYMMETRIES)
    if report.name in cfg.DATASETS.TEST:
        needed += densepose_files.GEODESICS
    for path in densepose_files.missing(needed):
        report.problem(
            "files", f"{path} does not exist: download {densepose_files.SITE}{path.name}"
        )


def _check_counts(official: Official, report: Report) -> None:
    """Hold the counts against the official ones; flaws of the official file are no problem."""
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


def _check_against_model(cfg, place: Place, report: Report) -> Dataset | None:
    """Open the data set as a run does; report what the model cannot learn from it."""
    try:
        dataset = get_dataset(report.name)
    except UserError as error:
        report.problem("version" if place.kind == "lvis" else "classes", error)
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
