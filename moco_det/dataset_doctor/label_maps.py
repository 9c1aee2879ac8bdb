"""Data sets whose annotations are images: Cityscapes, and VOC's semantic segmentation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.dataset_doctor.official import Place
from moco_det.dataset_doctor.report import Photograph, Report, spread
from moco_det.dataset_doctor.voc import read_list
from moco_det.datasets import read_labels
from moco_det.datasets.semantic import CITYSCAPES_LABEL_IDS, SEMANTIC_VOC_CLASSES

_LAST_LABEL = 33  # of Cityscapes' labels
_PHOTOGRAPH = "_leftImg8bit.png"
_INSTANCE_IDS = "_gtFine_instanceIds.png"
_LABEL_IDS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


def check_semantic_voc(place: Place, report: Report, limit: int | None) -> list[Photograph]:
    """Report what is wrong with the list and, of at most `limit` images, the label maps."""
    root, split = place.first, place.second
    images = root / "JPEGImages"
    maps = root / ("SegmentationClassAug" if split.endswith("_aug") else "SegmentationClass")
    split_file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if report.lacks((images, maps, split_file)):
        return []
    ids = read_list(split_file, report)
    report.images = len(ids)
    pairs = [(images / f"{i}.jpg", maps / f"{i}.png") for i in ids]
    for _, labels in pairs:
        if not labels.is_file():
            report.problem("labels", f"{labels} does not exist")
    return _check_maps(pairs, report, limit, len(SEMANTIC_VOC_CLASSES))


def check_semantic_cityscapes(place: Place, report: Report, limit: int | None) -> list[Photograph]:
    """The same for Cityscapes' trainIds, or where a photograph has none, labelIds."""
    pairs = _pairs(place, report, _LABEL_IDS)
    return _check_maps(pairs, report, limit, len(CITYSCAPES_LABEL_IDS))


def check_cityscapes(place: Place, report: Report, limit: int | None) -> list[Photograph]:
    """The same for Cityscapes' maps of instances."""
    pairs = _pairs(place, report, (_INSTANCE_IDS,))
    present = [pair for pair in pairs if pair[1].is_file()]
    for photograph, labels in spread(present, limit):
        for text in _instance_problems(photograph, labels):
            report.problem("labels", text)
    return [Photograph(photograph) for photograph, _ in pairs]


def _pairs(place: Place, report: Report, endings: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """(photograph, label map) of all of which at least one is there.

    The map has the first of `endings` of which there is a file. A missing map is a problem.
    """
    images, labels = (place.first / part / place.second for part in ("leftImg8bit", "gtFine"))
    if report.lacks((images, labels)):
        return []
    photographs = _by_id(images, _PHOTOGRAPH)
    maps = {}
    for ending in reversed(endings):
        maps |= _by_id(labels, ending)
    report.images = len(photographs)
    if not photographs and not maps:
        report.problem("list", f"{images} holds no CITY/*{_PHOTOGRAPH}")
    for image_id in sorted(photographs.keys() - maps.keys()):
        expected = " or ".join(f"{labels / image_id}{ending}" for ending in endings)
        report.problem("labels", f"{expected} does not exist")
    known = sorted(photographs.keys() | maps.keys())
    return [
        (
            photographs.get(image_id, Path(f"{images / image_id}{_PHOTOGRAPH}")),
            maps.get(image_id, Path(f"{labels / image_id}{endings[-1]}")),
        )
        for image_id in known
    ]


def _by_id(folder: Path, ending: str) -> dict[str, Path]:
    """ "CITY/ID" -> its file."""
    paths = folder.glob(f"*/*{ending}")
    return {str(path.relative_to(folder)).removesuffix(ending): path for path in paths}


def _check_maps(
    pairs: list[tuple[Path, Path]], report: Report, limit: int | None, num_classes: int
) -> list[Photograph]:
    present = [pair for pair in pairs if pair[1].is_file()]
    for photograph, labels in spread(present, limit):
        record = {"file_name": str(photograph), "sem_seg_file_name": str(labels)}
        size = _header_size(photograph)
        record |= dict(zip(("height", "width"), size, strict=True)) if size else {}
        try:
            read_labels(record, num_classes)
        except UserError as error:
            report.problem("labels", error)
    return [Photograph(photograph) for photograph, _ in pairs]


def _instance_problems(photograph: Path, labels: Path) -> Iterator[str]:
    try:
        with Image.open(labels) as image:
            mode, numbers = image.mode, np.array(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on bad files
        yield f"{labels} cannot be decoded: {error}"
        return
    if not mode.startswith("I"):
        yield f"{labels} is of Pillow's mode {mode}: a map of instances has one channel of 16 bits"
        return
    size = _header_size(photograph)
    if size not in (None, numbers.shape):
        (h, w), (height, width) = numbers.shape, size
        yield f"{labels} is {w}x{h} pixels, its photograph {width}x{height}"
    values = np.unique(numbers)
    found = np.where(values >= 1000, values // 1000, values)
    if found.max() > _LAST_LABEL:
        yield f"{labels} holds the label {found.max()}; Cityscapes' labels are 0 to {_LAST_LABEL}"


def _header_size(path: Path) -> tuple[int, int] | None:
    """(height, width); None where there is no image, which is reported elsewhere."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        return None
