"""COCO's instances format, with dense pose, and LVIS' variant: every image and annotation."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.dataset_doctor.report import ListedImage, Problem, Report
from moco_det.datasets import CocoDataset, DensePoseDataset, LvisDataset, read_coco
from moco_det.datasets.coco import dense_pose


def check_coco(files: CocoDataset, report: Report, masks: bool) -> list[ListedImage]:
    """Report what is wrong with the annotation file; return the images that it lists.

    `masks`: every object needs one.
    """
    try:
        content = read_coco(files.json_file)
    except UserError as error:
        report.problem("annotation", error)
        return []
    images = _check_images(content["images"], files, report)
    report.objects = len(content["annotations"])
    _check_ids(content["annotations"], report)
    if isinstance(files, DensePoseDataset):
        _check_dense_poses(content["annotations"], report)
    _check_annotations(content, images, report, masks)
    return [ListedImage(files.image_path(image), _size(image)) for image in images.values()]


def _check_images(entries: list[dict], files: CocoDataset, report: Report) -> dict[Any, dict]:
    """Image id -> entry; an entry without an id or a file name, or a second one, is a problem."""
    name = "coco_url" if isinstance(files, LvisDataset) else "file_name"
    report.images = len(entries)
    images = {}
    for entry in entries:
        absent = [key for key in ("id", name) if key not in entry]
        if absent:
            report.problem("annotation", f"an image lacks {', '.join(absent)}: {str(entry)[:80]}")
        elif entry["id"] in images:
            report.problem("list", f"image {entry['id']} is listed twice")
        else:
            images[entry["id"]] = entry
    if not entries:
        report.problem("list", f"{files.json_file} lists no image")
    return images


def _size(image: dict) -> tuple[int, int] | None:
    return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None


def _check_annotations(content: dict, images: dict, report: Report, masks: bool) -> None:
    categories = {category["id"]: category for category in content["categories"]}
    for annotation in content["annotations"]:
        label = _label(annotation)
        try:
            found = list(_annotation_problems(annotation, images, categories, masks))
        except (KeyError, TypeError, ValueError) as error:
            found = [Problem("annotation", f"is malformed: {type(error).__name__} {error}")]
        for check, text in found:
            report.problem(check, f"{label} {text}")


def _label(annotation: dict) -> str:
    return f"annotation {annotation.get('id', '?')} of image {annotation.get('image_id', '?')}"


def _check_ids(annotations: list[dict], report: Report) -> None:
    ids = Counter(annotation.get("id") for annotation in annotations)
    repeated = {i: times for i, times in ids.items() if i is not None and times > 1}
    if repeated and report.official and report.official.repeats:
        report.notes.append(
            f"{len(repeated)} annotations are listed more than once, as in the official file"
        )
        return
    for annotation_id, times in repeated.items():
        report.problem("list", f"annotation {annotation_id} is listed {times} times")


def _check_dense_poses(annotations: list[dict], report: Report) -> None:
    """Report those that are broken, and how many there are."""
    count = 0
    for annotation in annotations:
        try:
            count += bool(dense_pose(annotation))
        except (TypeError, ValueError) as error:
            report.problem("dense pose", f"{_label(annotation)} {error}")
    report.notes.append(f"{count:,} of {len(annotations):,} objects have dense pose")
    if not count:
        report.problem("dense pose", "no object has dp_x, dp_y, dp_I, dp_U and dp_V")


def _annotation_problems(
    annotation: dict, images: dict, categories: dict, masks: bool
) -> Iterator[Problem]:
    image, category = images.get(annotation["image_id"]), categories.get(annotation["category_id"])
    if image is None:
        yield Problem("annotation", "is of an image that the file does not list")
    if category is None:
        yield Problem("classes", f"is of category {annotation['category_id']}, which is not listed")
    x, y, width, height = annotation["bbox"]
    if min(width, height) <= 0:
        yield Problem("area", f"has a box of zero area, {annotation['bbox']}")
    elif image is not None and _size(image) and _is_outside(annotation["bbox"], *_size(image)):
        yield Problem("box", f"has a box outside of its image, {annotation['bbox']}")
    yield from _mask_problems(annotation.get("segmentation"), image, masks)
    keypoints = annotation.get("keypoints")
    names = (category or {}).get("keypoints", ())
    if keypoints is not None and len(keypoints) != 3 * len(names):
        text = f"has {len(keypoints)} numbers for {len(names)} keypoints; it needs 3 for each"
        yield Problem("keypoints", text)


def _is_outside(box: list[float], height: int, width: int) -> bool:
    x, y, w, h = box
    return x >= width or y >= height or x + w <= 0 or y + h <= 0


def _mask_problems(shape: Any, image: dict | None, masks: bool) -> Iterator[Problem]:
    if not shape:
        if masks:
            yield Problem("mask", "has no mask, and MODEL.MASK_ON is True")
    elif isinstance(shape, list):
        bad = [polygon for polygon in shape if len(polygon) < 6 or len(polygon) % 2]
        if bad:
            text = f"has {len(bad)} of {len(shape)} polygons with less than 3 points"
            yield Problem("mask", text)
    elif image is not None and _size(image) and tuple(shape["size"]) != _size(image):
        text = f"has a mask of (height, width) {shape['size']}; its image has {list(_size(image))}"
        yield Problem("mask", text)
    elif _area(shape) == 0:
        yield Problem("mask", "has a mask without a pixel")


def _area(shape: dict) -> int:
    """Pixels of a run-length encoded mask, compressed or not."""
    counts = shape["counts"]
    return sum(counts[1::2]) if isinstance(counts, list) else int(coco_mask.area(shape))
