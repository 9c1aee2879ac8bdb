"""Data sets that are folders of images and annotations: PASCAL VOC's layout and Cityscapes'."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from moco_det.common.errors import UserError
from moco_det.common.images import image_size
from moco_det.dataset_doctor.report import ListedImage, Report
from moco_det.datasets import (
    VOC_CLASSES,
    SemanticCityscapesDataset,
    SemanticDataset,
    SemanticVocDataset,
    VocDataset,
    read_labels,
)
from moco_det.datasets.cityscapes import IMAGE, LAST_LABEL, CityscapesDataset, read_instance_ids
from moco_det.datasets.voc import voc_size

LabelMaps = CityscapesDataset | SemanticCityscapesDataset | SemanticVocDataset


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """`limit` of `items` at equal distances, the first and the last among them; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit <= 1:
        return list(items[:limit])
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def check_voc(files: VocDataset, report: Report) -> list[ListedImage]:
    """Report what is wrong with the split list and the XML files; return the images listed."""
    ids = _listed(files, report)
    path_of = files.image_files()
    report.images, report.objects = len(ids), 0
    images = []
    for image_id in ids:
        size = _check_annotation(files.annotation_dir / f"{image_id}.xml", report)
        path = path_of.get(image_id, files.image_dir / f"{image_id}.jpg")
        images.append(ListedImage(path, size))
    return images


def _listed(files: VocDataset | SemanticVocDataset, report: Report) -> list[str]:
    """The ids of a split list; one that is listed twice is a problem."""
    ids = files.image_ids()
    for image_id, times in Counter(ids).items():
        if times > 1:
            report.problem("list", f"{files.split_file} lists {image_id} {times} times")
    if not ids:
        report.problem("list", f"{files.split_file} lists no image")
    return ids


def _check_annotation(path: Path, report: Report) -> tuple[int, int] | None:
    """Count and check the objects of one file; (height, width) where it gives them."""
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        report.problem("annotation", f"{path} cannot be read: {error}")
        return None
    for node in tree.findall("object"):
        report.objects += 1
        _check_object(node, path, report)
    return voc_size(tree)


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


def check_label_maps(files: LabelMaps, report: Report, limit: int | None) -> list[ListedImage]:
    """Report what is wrong with the list of images and, of at most `limit` of them, the maps."""
    if isinstance(files, SemanticVocDataset):
        pairs = _voc_pairs(files, report)
    else:
        pairs = _cityscapes_pairs(files, report)
    problems = _semantic_problems if isinstance(files, SemanticDataset) else _instance_problems
    present = [pair for pair in pairs if pair[1] and pair[1].is_file()]
    for pair in evenly_spaced(present, limit):
        for text in problems(*pair, len(files.all_classes)):
            report.problem("labels", text)
    return [ListedImage(image) for image, _ in pairs]


def _voc_pairs(files: SemanticVocDataset, report: Report) -> list[tuple[Path, Path]]:
    """(image, label map) of the split list; a missing map is a problem."""
    pairs = [files.paths(image_id) for image_id in _listed(files, report)]
    report.images = len(pairs)
    for _, labels in pairs:
        if not labels.is_file():
            report.problem("labels", f"{labels} does not exist")
    return pairs


def _cityscapes_pairs(
    files: CityscapesDataset | SemanticCityscapesDataset, report: Report
) -> list[tuple[Path, Path | None]]:
    """(image, label map) wherever at least one of the two exists; a missing map is a problem."""
    images, maps = files.files()
    report.images = len(images)
    stems = sorted(images.keys() | maps.keys())
    if not stems:
        report.problem("list", f"{files.image_dir} holds no CITY/*{IMAGE}")
    for stem in stems:
        if stem not in maps:
            report.problem("labels", f"{files.label_paths(stem)} does not exist")
    return [(files.image_path(stem), maps.get(stem)) for stem in stems]


def _semantic_problems(image: Path, labels: Path, num_classes: int) -> Iterator[str]:
    record = {"file_name": str(image), "sem_seg_file_name": str(labels)}
    size = _header_size(image)
    record |= dict(zip(("height", "width"), size, strict=True)) if size else {}
    try:
        read_labels(record, num_classes)
    except UserError as error:
        yield str(error)


def _instance_problems(image: Path, labels: Path, num_classes: int) -> Iterator[str]:
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
        return image_size(path)
    except UserError:
        return None
