"""How well a predicted surface fits an annotated person: geodesic point similarity, mask overlap.

Of one image D detections, G objects; an object has P annotated points.

Geodesic point similarity (GPS; Güler et al. 2018, normalised per part of the body as in the COCO
DensePose challenge): the mean over the object's points of exp(-d^2 / (2 kappa^2)), d the distance
along the body between the annotated point of the surface and the one that was detected at its
position, kappa the mean distance between two points of the annotated point's part. A point that the
detection takes for background or does not reach counts as 0.
"""

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.common.errors import import_optional
from moco_det.densepose.body import Geodesics, mean_distances
from moco_det.densepose.points import BOX_SIDE, NUM_CHARTS, decode_iuv

Annotation = dict[str, Any]  # of a COCO file; of a detection with "densepose", for `decode_iuv`


class Pairs(NamedTuple):
    """float64 (D, G) each: GPS, overlap of masks, overlap of boxes."""

    gps: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


class Points(NamedTuple):
    """(P,) each: positions in the image, points of the body (`Geodesics.nearest`), kappas."""

    x: np.ndarray
    y: np.ndarray
    body: np.ndarray
    kappa: np.ndarray


def pairwise_similarity(
    objects: list[Annotation],
    detections: list[Annotation],
    size: tuple[int, int],
    geodesics: Geodesics,
) -> Pairs:
    """Every detection of an image with every object of it, to the numbers of Detectron2.

    Args:
        objects: annotations; GPS is 0 without "dp_x" and its like, the mask that of "dp_masks" or
            without it of "segmentation".
        detections: results with "bbox" XYWH and "densepose".
        size: (height, width) of the image.

    Raises:
        UserError: a "densepose" that cannot be decoded.
        ValueError: one with charts beyond 24.
    """
    # GPS: each detected surface at each object's annotated points
    surfaces = [_surface(detection) for detection in detections]
    gps = np.zeros((len(detections), len(objects)))
    for column, item in enumerate(objects):
        if "dp_x" in item:
            points = _points(item, geodesics)
            corners = (detection["bbox"][:2] for detection in detections)
            pairs = zip(surfaces, corners, strict=True)
            gps[:, column] = [point_similarity(iuv, xy, points, geodesics) for iuv, xy in pairs]
    # Overlaps: of the masks, where a detection's is all that is not background, and of the boxes
    found = [
        _on_image(iuv[0] > 0, detection["bbox"], size)
        for iuv, detection in zip(surfaces, detections, strict=True)
    ]
    masks = [_object_mask(item, size) for item in objects]
    crowds = [item["iscrowd"] for item in objects]
    boxes = ([item["bbox"] for item in items] for items in (detections, objects))
    return Pairs(gps, _overlaps(found, masks, crowds), _overlaps(*boxes, crowds))


def point_similarity(iuv: np.ndarray, corner, points: Points, geodesics: Geodesics) -> float:
    """GPS of a detected surface, uint8 (3, h, w) with its upper left corner (x, y), to an object.

    The pixel that a point lies in is found by rounding towards zero, so a point less than one pixel
    left of the detection or above it is still in its first column or row.
    """
    x = (points.x - corner[0]).astype(int)
    y = (points.y - corner[1]).astype(int)
    inside = (x >= 0) & (y >= 0) & (x < iuv.shape[2]) & (y < iuv.shape[1])
    if not inside.any():
        return 0.0
    charts, u, v = iuv[:, y * inside, x * inside]
    detected = geodesics.nearest(charts * inside, u / 255, v / 255)
    distances = geodesics.distances(detected, points.body)
    return float(np.mean(np.exp(-(distances**2) / (2 * points.kappa**2))))


def _surface(detection: Annotation) -> np.ndarray:
    iuv = decode_iuv(detection["densepose"])
    if iuv[0].max() > NUM_CHARTS:
        raise ValueError(
            f"image {detection['image_id']}: a dense pose holds chart {iuv[0].max()}; there are "
            f"{NUM_CHARTS}"
        )
    return iuv


def _points(item: Annotation, geodesics: Geodesics) -> Points:
    x, y, charts, u, v = (np.asarray(item[f"dp_{field}"]) for field in "xyIUV")
    left, top, width, height = item["bbox"]
    known = charts > 0
    x, y, u, v = (values[known] for values in (x, y, u, v))
    charts = charts[known].astype(int)
    return Points(
        x=x * width / 255 + left,
        y=y * height / 255 + top,
        body=geodesics.nearest(charts, u, v),
        kappa=mean_distances(charts),
    )


def _object_mask(item: Annotation, size: tuple[int, int]) -> dict[str, Any]:
    """An object's mask as an RLE of the image."""
    if "dp_masks" in item:
        return _on_image(_stretched(item["dp_masks"], *item["bbox"][2:]), item["bbox"], size)
    shape = item.get("segmentation")
    if isinstance(shape, list) and shape:
        return coco_mask.merge(coco_mask.frPyObjects(shape, *size))
    if isinstance(shape, dict):
        compressed = not isinstance(shape["counts"], list)
        return shape if compressed else coco_mask.frPyObjects(shape, *size)
    return _on_image(np.zeros((0, 0), bool), item["bbox"], size)


def _stretched(masks: list, width: float, height: float) -> np.ndarray:
    """The union of the parts' masks, (256, 256) each, over a box of that many pixels, bool."""
    zoom = import_optional("scipy.ndimage", "dense pose", "scipy").zoom
    union = np.zeros((BOX_SIDE, BOX_SIDE))
    for mask in filter(None, masks):
        union[coco_mask.decode(mask) > 0] = 1
    scale = max(height, 1) / BOX_SIDE, max(width, 1) / BOX_SIDE
    return zoom(union, scale, order=1, prefilter=False) > 0.5


def _on_image(mask: np.ndarray, box, size: tuple[int, int]) -> dict[str, Any]:
    """A mask (h, w) in the pixels from the box's corner on, as an RLE of the whole image."""
    canvas = np.zeros(size, np.uint8, order="F")
    left, top = int(box[0]), int(box[1])
    right = min(int(box[0] + box[2]), size[1], left + mask.shape[1])
    bottom = min(int(box[1] + box[3]), size[0], top + mask.shape[0])
    rows, columns = slice(max(top, 0), bottom), slice(max(left, 0), right)
    if rows.start < bottom and columns.start < right:
        canvas[rows, columns] = mask[
            rows.start - top : bottom - top, columns.start - left : right - left
        ]
    return coco_mask.encode(canvas)


def _overlaps(detections: list, objects: list, crowds: list[int]) -> np.ndarray:
    """IoU, or for a crowd the share of the detection; (D, G)."""
    found = coco_mask.iou(detections, objects, crowds)
    return np.reshape(np.asarray(found, dtype=np.float64), (len(detections), len(objects)))
