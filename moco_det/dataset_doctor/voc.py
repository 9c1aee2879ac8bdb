"""PASCAL VOC's layout for detection: every split line, every XML file."""

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from moco_det.dataset_doctor.official import Place
from moco_det.dataset_doctor.report import Photograph, Report
from moco_det.datasets.voc import VOC_CLASSES


def check_voc(place: Place, report: Report) -> list[Photograph]:
    """Report what is wrong with lists and annotations; the photographs, some of which may lack."""
    root = place.first
    images, annotations = root / "JPEGImages", root / "Annotations"
    split_file = root / "ImageSets" / "Main" / f"{place.second}.txt"
    if report.lacks((images, annotations, split_file)):
        return []
    ids = read_list(split_file, report)
    path_of = {path.stem: path for path in sorted(images.iterdir(), reverse=True)}
    report.images, report.objects = len(ids), 0
    photographs = []
    for image_id in ids:
        size = _check_annotation(annotations / f"{image_id}.xml", place, report)
        path = path_of.get(image_id, images / f"{image_id}.jpg")
        photographs.append(Photograph(path, size))
    return photographs


def read_list(split_file: Path, report: Report) -> list[str]:
    """The ids of a split list; one that is listed twice is a problem."""
    lines = [line for line in split_file.read_text().splitlines() if line.strip()]
    ids = [Path(line.split()[0]).stem for line in lines]
    for image_id, times in Counter(ids).items():
        if times > 1:
            report.problem("list", f"{split_file} lists {image_id} {times} times")
    if not ids:
        report.problem("list", f"{split_file} lists no image")
    return ids


def _check_annotation(path: Path, place: Place, report: Report) -> tuple[int, int] | None:
    """Count and check the objects of one file; (height, width) where it gives them."""
    try:
        tree = ElementTree.parse(path)
    except (OSError, ElementTree.ParseError) as error:
        report.problem("annotation", f"{path} cannot be read: {error}")
        return None
    size = _size(tree)
    for node in tree.findall("object"):
        report.objects += 1
        _check_object(node, path, place, report)
    return size


def _size(tree: ElementTree.ElementTree) -> tuple[int, int] | None:
    try:
        size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _check_object(node: ElementTree.Element, path: Path, place: Place, report: Report) -> None:
    name = (node.findtext("name") or "").strip()
    if not name:
        report.problem("annotation", f"{path} has an <object> without a <name>")
    elif place.official and name not in VOC_CLASSES:
        report.problem("classes", f"{path} has a {name!r}, which is none of VOC's 20 classes")
    try:
        corners = [float(node.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
    except (TypeError, ValueError):
        report.problem("annotation", f"{path}: {name!r} lacks the numbers of a <bndbox>")
        return
    xmin, ymin, xmax, ymax = corners
    if xmax <= xmin or ymax <= ymin:
        shown = ", ".join(f"{corner:g}" for corner in corners)
        report.problem("area", f"{path}: {name!r} has a box of zero area, ({shown})")
