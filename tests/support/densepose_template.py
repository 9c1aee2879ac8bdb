"""A stand-in for the body model of dense pose, flat, so that its geodesics are known exactly.

Twelve rectangles, far from each other, each of two charts that are squares and share an edge: chart
2k - 1 is the left half, chart 2k the right, U runs to the right and V down. So the distance between
two points of a rectangle is that of the plane, also across the edge. Each chart has vertices of its
own on that edge, two for each point, as the real files have on the seams of the body.
"""

import itertools
import pickle
from pathlib import Path

import numpy as np
from scipy.io import savemat

SIDE = 0.25  # of a chart, in metres: so 24 of them have about the area of a body
FAR = 10.0  # between points of different rectangles


def distance(first, second) -> float:
    """The geodesic between two points (part, U, V), in metres."""
    (part, u, v), (other, w, z) = first, second
    if (part - 1) // 2 != (other - 1) // 2:
        return FAR
    across = (part + u) - (other + w)  # the right half begins where the left one ends
    return SIDE * float(np.hypot(across, v - z))


def write_template(folder, steps: int = 15) -> Path:
    """Write SMPL_subdiv.mat, SMPL_SUBDIV_TRANSFORM.mat and Pdist_matrix.pkl into the folder.

    Args:
        folder: created where it is absent.
        steps: of the grid of vertices along the side of a chart. A divisor of 255 puts vertices on
            numbers that an image of IUV holds exactly.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vertices = np.array(list(itertools.product(range(1, 25), range(steps + 1), range(steps + 1))))
    # In no particular order, as the real ones: what depends on it would be wrong there.
    vertices = np.random.default_rng(0).permutation(vertices)
    part, u, v = vertices.T
    columns = {"Part_ID_subdiv": part, "U_subdiv": u / steps, "V_subdiv": v / steps}
    savemat(folder / "SMPL_subdiv.mat", {name: x[:, None] for name, x in columns.items()})

    places = np.stack([(part - 1) // 2, u + steps * ((part - 1) % 2), v], axis=1)
    points, index = np.unique(places, axis=0, return_inverse=True)
    savemat(folder / "SMPL_SUBDIV_TRANSFORM.mat", {"index": index.reshape(-1, 1) + 1})

    with open(folder / "Pdist_matrix.pkl", "wb") as file:
        pickle.dump({"Pdist_matrix": _pairwise(points, steps)}, file, protocol=4)
    return folder


def _pairwise(points: np.ndarray, steps: int) -> np.ndarray:
    """float32 (N (N - 1) / 2, 1): rows of the lower triangle, (1, 0), (2, 0), (2, 1), (3, 0)..."""
    rows = []
    for number in range(1, len(points)):
        offset = points[:number] - points[number]
        found = SIDE / steps * np.hypot(offset[:, 1], offset[:, 2])
        rows.append(np.where(offset[:, 0] == 0, found, FAR).astype(np.float32))
    return np.concatenate(rows)[:, None]
