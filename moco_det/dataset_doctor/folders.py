"""Data sets that are folders of images and annotations: PASCAL VOC's layout and Cityscapes'."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from moco_det.common.errors import UserError
from moco_det.dataset_doctor.report import ListedImage, Report
from moco_det.datasets import (
    VOC_CLASSES,
    CityscapesDataset,
    Location,
    SemanticVocDataset,
    VocDataset,
    read_labels,
)
from moco_det.datasets.cityscapes import LAST_LABEL, files_by_city, read_instance_ids
from moco_det.datasets.semantic import CITYSCAPES_LABEL_IDS, SEMANTIC_VOC_CLASSES

_IMAGE = "_leftImg8bit.png"
_INSTANCE_IDS = "_gtFine_instanceIds.png"
_LABEL_IDS = ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png")


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """`limit` of `items` at equal distances, the first and the last among them; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit <= 1:
        return list(items[:limit])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def check_voc(location: Location, report: Report) -> list[ListedImage]:
    """Report what is wrong with the split list and the XML files; return the images listed."""
    files = VocDataset(report.name, (), location.first, location.second)
    if report.lacks((files.image_dir, files.annotation_dir, files.split_file)):
        return []
    ids = _read_list(files.split_file, report)
    path_of = {path.stem: path for path in sorted(files.image_dir.iterdir(), reverse=True)}
    report.images, report.objects = len(ids), 0
    images = []
    for image_id in ids:
        size = _check_annotation(files.annotation_dir / f"{image_id}.xml", report)
        path = path_of.get(image_id, files.image_dir / f"{image_id}.jpg")
        images.append(ListedImage(path, size))
    return images


def _read_list(split_file: Path, report: Report) -> list[str]:
    """The ids of a split list; one that is listed twice is a problem."""
    lines = [line for line in split_file.read_text().splitlines() if line.strip()]
    ids = [Path(line.split()[0]).stem for line in lines]
    for image_id, times in Counter(ids).items():
        if times > 1:
            report.problem("list", f"{split_file} lists {image_id} {times} times")
    if not ids:
        report.problem("list", f"{split_file} lists no image")
    return ids


def _check_annotation(path: Path, report: Report) -> tuple[int, int] | None:
    """Count and check the objects of one file; (height, width) where it gives them."""
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        report.problem("annotation", f"{path} cannot be read: {error}")
        return None
    size = _size(tree)
    for node in tree.findall("object"):
        report.objects += 1
        _check_object(node, path, report)
    return size


def _size(tree: ElementTree.ElementTree) -> tuple[int, int] | None:
    try:
        size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _check_object(node: ElementTree.Element, path: Path, report: Report) -> None:
    name = (node.findtext("name") or "").strip()
    if not name:
        report.problem("annotation", f"{path} has an <object> without a <name>")
    elif report.official and name not in VOC_CLASSES:
        report.problem("classes", f"{path} has a {name!r}, which is not one of VOC's 20 classes")
    try:
        corners = [float(node.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
    except (TypeError, ValueError):
        report.problem("annotation", f"{path}: {name!r} lacks the numbers of a <bndbox>")
        return
    xmin, ymin, xmax, ymax = corners
    if xmax <= xmin or ymax <= ymin:
        shown = ", ".join(f"{corner:g}" for corner in corners)
        report.problem("area", f"{path}: {name!r} has a box of zero area, ({shown})")


def check_semantic_voc(location: Location, report: Report, limit: int | None) -> list[ListedImage]:
    """Report what is wrong with the split list and, of at most `limit` images, the label maps."""
    files = SemanticVocDataset(report.name, (), location.first, location.second)
    if report.lacks((files.image_dir, files.label_dir, files.split_file)):
        return []
    ids = _read_list(files.split_file, report)
    report.images = len(ids)
    pairs = [(files.image_dir / f"{i}.jpg", files.label_dir / f"{i}.png") for i in ids]
    for _, labels in pairs:
        if not labels.is_file():
            report.problem("labels", f"{labels} does not exist")
    return _check_maps(pairs, report, limit, len(SEMANTIC_VOC_CLASSES))


def check_semantic_cityscapes(
    location: Location, report: Report, limit: int | None
) -> list[ListedImage]:
    """The same for Cityscapes' trainIds, or where an image has none, labelIds."""
    pairs = _cityscapes_pairs(location, report, _LABEL_IDS)
    return _check_maps(pairs, report, limit, len(CITYSCAPES_LABEL_IDS))


def check_cityscapes(location: Location, report: Report, limit: int | None) -> list[ListedImage]:
    """The same for Cityscapes' maps of instances."""
    pairs = _cityscapes_pairs(location, report, (_INSTANCE_IDS,))
    present = [pair for pair in pairs if pair[1].is_file()]
    for image, labels in evenly_spaced(present, limit):
        for text in _instance_problems(image, labels):
            report.problem("labels", text)
    return [ListedImage(image) for image, _ in pairs]


def _cityscapes_pairs(
    location: Location, report: Report, endings: tuple[str, ...]
) -> list[tuple[Path, Path]]:
    """(image, label map) wherever at least one of the two exists.

    The map has the first of `endings` for which there is a file. A missing map is a problem.
    """
    files = CityscapesDataset(report.name, (), location.first, location.second)
    if report.lacks((files.image_dir, files.label_dir)):
        return []
    images = files_by_city(files.image_dir, _IMAGE)
    maps = {}
    for ending in reversed(endings):
        maps |= files_by_city(files.label_dir, ending)
    report.images = len(images)
    if not images and not maps:
        report.problem("list", f"{files.image_dir} holds no CITY/*{_IMAGE}")
    for image_id in sorted(images.keys() - maps.keys()):
        expected = " or ".join(f"{files.label_dir / image_id}{ending}" for ending in endings)
        report.problem("labels", f"{expected} does not exist")
    return [
        (
            images.get(image_id, Path(f"{files.image_dir / image_id}{_IMAGE}")),
            maps.get(image_id, Path(f"{files.label_dir / image_id}{endings[-1]}")),
        )
        for image_id in sorted(images.keys() | maps.keys())
    ]


def _check_maps(
    pairs: list[tuple[Path, Path]], report: Report, limit: int | None, num_classes: int
) -> list[ListedImage]:
    present = [pair for pair in pairs if pair[1].is_file()]
    for image, labels in evenly_spaced(present, limit):
        record = {"file_name": str(image), "sem_seg_file_name": str(labels)}
        size = _header_size(image)
        record |= dict(zip(("height", "width"), size, strict=True)) if size else {}
        try:
            read_labels(record, num_classes)
        except UserError as error:
            report.problem("labels", error)
    return [ListedImage(image) for image, _ in pairs]


def _instance_problems(image: Path, labels: Path) -> Iterator[str]:
    try:
        numbers = read_instance_ids(labels)
    except UserError as error:
        yield str(error)
        return
    size = _header_size(image)
    if size not in (None, numbers.shape):
        (h, w), (height, width) = numbers.shape, size
        yield f"{labels} is {w}x{h} pixels, its image {width}x{height}"
    values = np.unique(numbers)
    found = np.where(values >= 1000, values // 1000, values)
    if found.max() > LAST_LABEL:
        yield f"{labels} holds the label {found.max()}; Cityscapes' labels are 0 to {LAST_LABEL}"


def _header_size(path: Path) -> tuple[int, int] | None:
    """(height, width); None where there is no image, which is reported elsewhere."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        return None
