"""Windows of an image: random ones as torchvision draws them, and how far two of them overlap."""

import math
from collections.abc import Iterator

import numpy as np

Window = tuple[int, int, int, int]  # top, left, height and width in pixels

RATIO = 3 / 4, 4 / 3  # of width to height
TRIES = 10  # torchvision's, for a window that fits; those of the paper, for one that overlaps
ROUNDS, PAIRS = 10, 1000  # rounds of so many pairs, for one whose IoU is within limits


def draw_crop(
    height: int, width: int, rng: np.random.Generator, least: float = 0.2, most: float = 1.0
) -> Window:
    """A window as torchvision's RandomResizedCrop draws it: `least` to `most` of the area.

    After ten draws that do not fit, the largest central window of an allowed ratio is taken.
    """
    for window in _tries(height, width, rng, least, most):
        return window
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def draw_crop_within(
    height: int,
    width: int,
    rng: np.random.Generator,
    least: float,
    most: float,
    anchor: Window,
    share: float,
) -> tuple[Window, bool]:
    """A window of which at least `share` lies within `anchor`, and whether it is a free one.

    After ten draws of which none fits and overlaps so far, it is one of `draw_crop`, wherever that
    lies (arXiv:2106.05967, Sec. 4.1; the number of draws and what follows them are those of the
    authors' code).
    """
    for window in _tries(height, width, rng, least, most):
        if share_within(window, anchor) >= share:
            return window, False
    return draw_crop(height, width, rng, least, most), True


def _tries(
    height: int, width: int, rng: np.random.Generator, least: float, most: float
) -> Iterator[Window]:
    """Those of ten draws that fit into the image."""
    for _ in range(TRIES):
        target = height * width * rng.uniform(least, most)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            yield top, left, h, w


def draw_pair(
    height: int,
    width: int,
    rng: np.random.Generator,
    least: float,
    most: float,
    ious: tuple[float, float],
) -> tuple[Window, Window] | None:
    """Two windows whose IoU is within `ious`, both ends included; None where no draw gives such.

    They are what pairs of free crops are under this condition: both are drawn anew each time, many
    at once, since of usual images 1 pair in 250 is disjoint, and 1 in 2,500 of square ones.
    """
    for _ in range(ROUNDS):
        first, second = (_windows(height, width, rng, least, most, PAIRS) for _ in range(2))
        fit = _fits(first, height, width) & _fits(second, height, width)
        if not fit.any():
            break
        first, second = first[:, fit], second[:, fit]
        overlap = iou(first, second)
        (found,) = np.nonzero((ious[0] <= overlap) & (overlap <= ious[1]))
        if len(found):
            return tuple(tuple(windows[:, found[0]].tolist()) for windows in (first, second))
    return None


def _windows(
    height: int, width: int, rng: np.random.Generator, least: float, most: float, count: int
) -> np.ndarray:
    """4 x `count`: draws of windows, of which some may not fit into the image."""
    target = height * width * rng.uniform(least, most, count)
    aspect = np.exp(rng.uniform(*np.log(RATIO), count))
    w, h = np.sqrt(target * aspect).round(), np.sqrt(target / aspect).round()
    top, left = (
        np.floor(rng.random(count) * (whole - side + 1).clip(0))
        for whole, side in ((height, h), (width, w))
    )
    return np.stack([top, left, h, w]).astype(int)


def _fits(windows: np.ndarray, height: int, width: int) -> np.ndarray:
    _, _, h, w = windows
    return (np.minimum(h, w) > 0) & (h <= height) & (w <= width)


# -- overlap --------------------------------------------------------------------------------------
# Windows are tuples of four numbers, or 4 x N arrays of N windows.


def intersection(one: Window, other: Window) -> int:
    """Pixels that are in both."""
    h, w = (
        np.minimum(one[axis] + one[axis + 2], other[axis] + other[axis + 2])
        - np.maximum(one[axis], other[axis])
        for axis in (0, 1)
    )
    return np.maximum(h, 0) * np.maximum(w, 0)


def share_within(window: Window, anchor: Window) -> float:
    """The share of a window's own area that lies within another one."""
    return intersection(window, anchor) / (window[2] * window[3])


def iou(one: Window, other: Window) -> float:
    """Intersection over union."""
    common = intersection(one, other)
    union = one[2] * one[3] + other[2] * other[3] - common
    return common / union
