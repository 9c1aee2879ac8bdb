"""The template body of dense pose: its files, its mirror symmetry, distances along its surface.

The files are not part of this project: their licence (CC BY-NC 4.0, and SMPL's) is for the user
to accept. Detectron2's DensePose fetches the same files by itself from the same place; here they
lie below $DETECTRON2_DATASETS, in the folder that they have in that URL.

Only the vertices of a fine mesh have distances, computed beforehand: a point stands for the vertex
of its chart that is nearest in (U, V). Vertices on the seam of two charts lie on the same point of
the body.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask

from moco_det.common.checkpoint_files import read_checkpoint
from moco_det.common.errors import UserError, import_optional
from moco_det.datasets import data_root
from moco_det.densepose.points import BOX_SIDE, NUM_CHARTS, Symmetries, decode_iuv

SITE = "https://dl.fbaipublicfiles.com/densepose/data/"
SYMMETRIES = "UV_symmetry_transforms.mat"  # what becomes of U and V in a mirrored image
VERTICES = "SMPL_subdiv.mat"  # part, U and V of each vertex of the charts
POINTS = "SMPL_SUBDIV_TRANSFORM.mat"  # the point of the body that each vertex lies on
DISTANCES = "Pdist_matrix.pkl"  # geodesics between these points
GEODESICS = (VERTICES, POINTS, DISTANCES)

# Mean geodesic distance in metres between two points of each of 8 parts of the body: torso, hands,
# feet, upper and lower legs, upper and lower arms, head; and the part of each of the 24 charts.
# Constants of the official evaluation, for the body of its template.
_MEAN_DISTANCES = (0.351, 0.107, 0.126, 0.237, 0.173, 0.142, 0.128, 0.150)
_PARTS = (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7)


def file_path(name: str) -> Path:
    """Where the file of that name belongs."""
    return data_root() / "densepose" / "data" / name


def missing(names: Iterable[str]) -> list[Path]:
    """The paths of those files that do not exist."""
    return [file_path(name) for name in names if not file_path(name).is_file()]


def require(names: Iterable[str], purpose: str) -> None:
    """Check that the files are there, and that what reads them is installed.

    Args:
        purpose: what cannot be done without them, as the subject of the message.

    Raises:
        UserError: names what is absent, where to get it, and where to put it.
    """
    absent = missing(names)
    if absent:
        listed = ", ".join(path.name for path in absent)
        raise UserError(
            f"{purpose} needs {listed} in {absent[0].parent}: download {SITE}{absent[0].name}"
            f"{', and the others beside it' if len(absent) > 1 else ''} (no checksum is "
            "published); DETECTRON2_DATASETS names the folder that holds densepose/data, now "
            f"{data_root()}"
        )
    _scipy("io")


def read_mat(path: Path) -> dict[str, Any]:
    """The arrays of a MATLAB file, by name.

    Raises:
        UserError: SciPy is missing; the file cannot be read.
    """
    scipy_io = _scipy("io")
    try:
        return scipy_io.loadmat(path)
    except Exception as error:  # SciPy raises OSError, ValueError, NotImplementedError, ...
        raise UserError(f"{path} is damaged or not a MATLAB file: {error}") from error


def _scipy(module: str) -> ModuleType:
    return import_optional(f"scipy.{module}", "dense pose", "scipy")


def load_symmetries() -> Symmetries:
    """What a mirror does to U and V, from the user's file.

    Raises:
        UserError: it is absent, or not what it should be.
    """
    name = SYMMETRIES
    require([name], "INPUT.RANDOM_FLIP horizontal of a dense pose model")
    path = file_path(name)
    content = read_mat(path)
    try:
        u, v = (
            torch.from_numpy(np.stack(list(content[key][0])).astype(np.float32))
            for key in ("U_transforms", "V_transforms")
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold U_transforms and V_transforms: {error}") from error
    expected = (NUM_CHARTS, BOX_SIDE, BOX_SIDE)
    if u.shape != expected or v.shape != expected:
        raise UserError(
            f"{path}: U_transforms and V_transforms are {tuple(u.shape)} and {tuple(v.shape)}, "
            f"not {expected}"
        )
    return Symmetries(u, v)


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
        self._cdist = _scipy("spatial.distance").cdist

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
    """Those of the official files.

    The distances, about 380 million, take what their file does, and twice that while it is read.

    Raises:
        UserError: a file is absent, damaged, or does not fit the others.
    """
    require(GEODESICS, "the evaluation of dense pose")
    vertices, points, distances = map(file_path, GEODESICS)
    mesh = read_mat(vertices)
    charts = _column(mesh, "Part_ID_subdiv", vertices).astype(np.int64)
    uv = np.stack([_column(mesh, f"{axis}_subdiv", vertices) for axis in "UV"])
    index = read_mat(points)
    index = _column(index, "index", points).astype(np.int64) - 1
    condensed = _column(read_checkpoint(distances), "Pdist_matrix", distances)
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
    names = GEODESICS
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
        folder = file_path(names[0]).parent
        raise UserError(
            f"{', '.join(names)} in {folder} do not fit each other: {wrong}; download them anew"
        )


# -- how well a predicted surface fits an annotated person -----------------------------------------
#
# Of one image D detections, G objects; an object has P annotated points.
#
# Geodesic point similarity (GPS; Güler et al. 2018, normalised per part of the body as in the COCO
# DensePose challenge): the mean over the object's points of exp(-d^2 / (2 kappa^2)), d the distance
# along the body between the annotated point of the surface and the one that was detected at its
# position, kappa the mean distance between two points of the annotated point's part. A point that
# the detection takes for background or does not reach counts as 0.

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
