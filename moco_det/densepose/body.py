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
from typing import Any

import numpy as np
import torch

from moco_det.common.checkpoint_files import read_checkpoint
from moco_det.common.errors import UserError, import_optional
from moco_det.datasets import data_root
from moco_det.densepose.points import BOX_SIDE, NUM_CHARTS, Symmetries

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
