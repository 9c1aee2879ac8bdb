"""J and F of DAVIS (Perazzi et al. 2016; Pont-Tuset et al. 2017): regions and their boundaries.

    J    intersection over union of two masks
    F    harmonic mean of precision and recall of boundary pixels, each of which counts as found
         within 0.8 % of the image's diagonal

Behaviour is that of the official davis2017-evaluation. Neither a sequence's first frame, which is
given, nor its last is measured; what is empty in both masks is right, 1. An object's measure is its
mean over frames, the data set's the mean over all objects of all sequences. An object counts if the
first frame has it; void pixels, 255, are background.
"""

import math

import cv2
import numpy as np

TOLERANCE = 0.008  # of the diagonal


def jaccard(found: np.ndarray, true: np.ndarray) -> float:
    """J of two masks, bool H x W."""
    union = np.count_nonzero(found | true)
    return np.count_nonzero(found & true) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """The boundary of a mask, bool H x W, one pixel wide: pixels unlike one of the neighbours to
    the right, below and both.

    The image's border is no boundary.
    """
    # Beyond the border the mask goes on as it ends.
    beyond = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (beyond[1:, :-1] != mask) | (beyond[:-1, 1:] != mask) | (beyond[1:, 1:] != mask)


def boundary_f(found: np.ndarray, true: np.ndarray) -> float:
    """F of two masks, bool H x W."""
    radius = math.ceil(TOLERANCE * math.hypot(*true.shape))
    edges = boundary(found), boundary(true)
    if not (edges[0].any() and edges[1].any()):
        return float(edges[0].any() == edges[1].any())
    precision = _widened(edges[1], radius)[edges[0]].mean()
    recall = _widened(edges[0], radius)[edges[1]].mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _widened(edge: np.ndarray, radius: int) -> np.ndarray:
    """Which pixels lie within `radius` of one of the edge's."""
    offsets = np.arange(-radius, radius + 1)
    disc = offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2
    return cv2.dilate(edge.astype(np.uint8), disc.astype(np.uint8)).astype(bool)


def measure_frame(found: np.ndarray, true: np.ndarray, objects: int) -> np.ndarray:
    """J and F of each of N objects, N x 2.

    Args:
        found, true: masks of objects' numbers, 1 to N and others that do not count, H x W.
    """
    pairs = [(found == number, true == number) for number in range(1, objects + 1)]
    return np.array([(jaccard(*pair), boundary_f(*pair)) for pair in pairs])
