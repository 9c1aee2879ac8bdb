"""Distances along the surface of the template body, between points given as chart, U and V.

Only the vertices of a fine mesh have distances, found out beforehand: a point stands for the vertex
of its chart that is nearest in (U, V). Vertices on the seam of two charts lie on the same point of
the body.

How well a detected surface fits an annotated person: geodesic point similarity, mask overlap.

Of one image D detections, G objects; an object has P annotated points.

Geodesic point similarity (GPS; Güler et al. 2018, normalised per part of the body as in the COCO
DensePose challenge): the mean over the object's points of exp(-d^2 / (2 kappa^2)), d the distance
along the body between the annotated point of the surface and the one that was detected in its
place, kappa the mean distance between two points of the annotated point's part. A point that the
detection takes for background or does not reach counts as 0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from moco_det.common.errors import UserError
from moco_det.densepose import files as densepose_files
from moco_det.densepose.iuv import decode_iuv
from moco_det.densepose.points import NUM_CHARTS
from moco_det.evaluation.official import import_tool
from moco_det.weights.files import read_pickle

# Mean geodesic distance in metres between two points of each of 8 parts of the body: torso, hands,
# feet, upper and lower legs, upper and lower arms, head; and the part of each of the 24 charts.
# Constants of the official evaluation, for the body of its template.
_MEAN_DISTANCES = (0.351, 0.107, 0.126, 0.237, 0.173, 0.142, 0.128, 0.150)
_PARTS = (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7)


def mean_distances(charts: np.ndarray) -> np.ndarray:
    """kappa of each point in metres, by its chart in 1..24, int (P,) to float64 (P,)."""
    return np.array(_MEAN_DISTANCES)[np.array(_PARTS)[charts - 1]]


class Geodesics:
    """Geodesic distances between points of the charts.

    Args:
        charts: of the V vertices, int (V,), 1 to 24.
        uv: their coordinates on it, in [0, 1], float (2, V).
        points: the point of the body that each lies on, int (V,), from 0.
        between: (int (P,), int (P,)) to float (P,): the distances in metres of pairs of different
            points, the larger number first.
    """

    def __init__(
        self,
        charts: np.ndarray,
        uv: np.ndarray,
        points: np.ndarray,
        between: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ):
        members = [np.flatnonzero(charts == chart) for chart in range(1, NUM_CHARTS + 1)]
        self._charts = [(uv[:, mine].T, points[mine]) for mine in members]
        self._between = between
        self._cdist = import_tool("scipy.spatial.distance", "scipy").cdist

    def nearest(self, charts: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The point of the body, (P,), nearest to each (chart, U, V); -1 where the chart is 0."""
        found = np.full(len(charts), -1)
        uv = np.stack([u, v], axis=1)
        for chart in np.unique(charts[charts > 0]):
            mine = charts == chart
            vertices, points = self._charts[chart - 1]
            found[mine] = points[self._cdist(vertices, uv[mine]).argmin(axis=0)]
        return found

    def distances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Metres, float64 (P,), between points of `nearest`; infinite where one of them is -1."""
        found = np.where(first == second, 0.0, np.inf)
        different = (first != second) & (first >= 0) & (second >= 0)
        pair = first[different], second[different]
        found[different] = self._between(np.maximum(*pair), np.minimum(*pair))
        found[(first < 0) | (second < 0)] = np.inf
        return found


def read_geodesics() -> Geodesics:
    """Those of the official files, for which see `moco_det.densepose.files`.

    The distances, about 380 million, take what their file does, and twice that while it is read.

    Raises:
        UserError: a file is absent, damaged, or does not fit the others.
    """
    densepose_files.require(densepose_files.GEODESICS, "the evaluation of dense pose")
    vertices, points, distances = map(densepose_files.file_path, densepose_files.GEODESICS)
    mesh = densepose_files.read_mat(vertices)
    charts = _column(mesh, "Part_ID_subdiv", vertices).astype(np.int64)
    uv = np.stack([_column(mesh, f"{axis}_subdiv", vertices) for axis in "UV"])
    index = densepose_files.read_mat(points)
    index = _column(index, "index", points).astype(np.int64) - 1
    condensed = _column(read_pickle(distances), "Pdist_matrix", distances)
    _check(charts, uv, index, condensed)

    def between(larger: np.ndarray, smaller: np.ndarray) -> np.ndarray:
        """The file holds the lower triangle, row by row."""
        return condensed[larger * (larger - 1) // 2 + smaller]

    return Geodesics(charts, uv, index, between)


def _column(content: object, name: str, path: Path) -> np.ndarray:
    try:
        column = content[name]
    except (KeyError, TypeError, IndexError):
        column = None
    if not isinstance(column, np.ndarray) or column.dtype.kind not in "fiu":
        raise UserError(f"{path} holds no array {name}: download it anew")
    return column.reshape(-1)


def _check(charts: np.ndarray, uv: np.ndarray, index: np.ndarray, condensed: np.ndarray) -> None:
    names = densepose_files.GEODESICS
    count = int(index.max(initial=-1)) + 1
    wrong = ""
    if not len(charts) == uv.shape[1] == len(index):
        wrong = f"the first has {len(charts):,} vertices, the second {len(index):,} points"
    elif not set(range(1, NUM_CHARTS + 1)) <= set(charts.tolist()) or index.min() < 0:
        wrong = f"not every chart of {NUM_CHARTS} has a vertex, or points do not count from 1"
    elif len(condensed) < count * (count - 1) // 2:  # more: points without a vertex
        wrong = (
            f"{count:,} points have {count * (count - 1) // 2:,} distances, the third has "
            f"{len(condensed):,}"
        )
    if wrong:
        folder = densepose_files.file_path(names[0]).parent
        raise UserError(
            f"{', '.join(names)} in {folder} do not fit each other: {wrong}; download them anew"
        )


Annotation = dict[str, Any]  # of a COCO file; of a detection with "densepose", for `decode_iuv`


class Pairs(NamedTuple):
    """float64 (D, G) each: GPS, overlap of masks, overlap of boxes."""

    gps: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


class Points(NamedTuple):
    """(P,) each: places in the image, points of the body (see `Geodesics.nearest`), kappas."""

    x: np.ndarray
    y: np.ndarray
    body: np.ndarray
    kappa: np.ndarray


def compare(
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
    surfaces = [_surface(detection) for detection in detections]
    gps = np.zeros((len(detections), len(objects)))
    for column, item in enumerate(objects):
        if "dp_x" in item:
            points = _points(item, geodesics)
            corners = (detection["bbox"][:2] for detection in detections)
            pairs = zip(surfaces, corners, strict=True)
            gps[:, column] = [similarity(iuv, xy, points, geodesics) for iuv, xy in pairs]
    found = [
        _on_image(iuv[0] > 0, detection["bbox"], size)
        for iuv, detection in zip(surfaces, detections, strict=True)
    ]
    masks = [_object_mask(item, size) for item in objects]
    crowds = [item["iscrowd"] for item in objects]
    boxes = ([item["bbox"] for item in items] for items in (detections, objects))
    return Pairs(gps, _overlaps(found, masks, crowds), _overlaps(*boxes, crowds))


def similarity(iuv: np.ndarray, corner, points: Points, geodesics: Geodesics) -> float:
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
    zoom = import_tool("scipy.ndimage", "scipy").zoom
    union = np.zeros((256, 256))
    for mask in filter(None, masks):
        union[coco_mask.decode(mask) > 0] = 1
    scale = max(height, 1) / 256, max(width, 1) / 256
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
