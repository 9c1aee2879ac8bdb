"""The files of the body model that dense pose needs, which its authors hand out and the user puts.

They are no part of this project: their licence (CC BY-NC 4.0, and SMPL's) is for the user to
accept. Detectron2's DensePose fetches the same files by itself from the same place; here they lie
below $DETECTRON2_DATASETS, in the folder that they have in that URL.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moco_det.common.errors import UserError
from moco_det.datasets import data_root

SITE = "https://dl.fbaipublicfiles.com/densepose/data/"
SYMMETRIES = "UV_symmetry_transforms.mat"  # what becomes of U and V in a mirrored image
VERTICES = "SMPL_subdiv.mat"  # part, U and V of each vertex of the charts
POINTS = "SMPL_SUBDIV_TRANSFORM.mat"  # the point of the body that each vertex lies on
DISTANCES = "Pdist_matrix.pkl"  # geodesics between these points
GEODESICS = (VERTICES, POINTS, DISTANCES)


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
    _loadmat()


def read_mat(path: Path) -> dict[str, Any]:
    """The arrays of a MATLAB file, by name.

    Raises:
        UserError: SciPy is missing; the file cannot be read.
    """
    loadmat = _loadmat()
    try:
        return loadmat(path)
    except Exception as error:  # SciPy raises OSError, ValueError, NotImplementedError, ...
        raise UserError(f"{path} is damaged or no MATLAB file: {error}") from error


def _loadmat():
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"dense pose needs the package scipy: pip install scipy ({error})"
        ) from error
    return loadmat
