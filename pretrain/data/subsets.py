"""Subsets of a data set: images at random, or classes with a long tail (arXiv:2106.05967, 3.2).

Shape legend:
    C: classes
"""

import os

import numpy as np

from moco_det.common.documents import shown
from moco_det.common.errors import UserError

SMALLEST = 5  # images of a class; ImageNet-LT's classes have 5 to 1280


def random_subset(images: int, wanted: int, seed: int) -> np.ndarray:
    """Sorted numbers of `wanted` of so many images. Raises UserError where there are fewer."""
    if wanted > images:
        raise UserError(f"--random {wanted}: there are {images} images")
    return np.sort(np.random.default_rng(seed).permutation(images)[:wanted])


def class_numbers(paths: np.ndarray) -> np.ndarray:
    """The class of each path, 0 to C-1: its first folder. Raises UserError for one without."""
    for path in paths:
        if b"/" not in path:
            name = shown(os.fsdecode(path))
            raise UserError(f"--long-tailed is about classes: {name} is in no class folder")
    return np.unique([path.partition(b"/")[0] for path in paths], return_inverse=True)[1]


def long_tailed_subset(
    labels: np.ndarray, alpha: float, seed: int, total: int | None = None
) -> np.ndarray:
    """Sorted numbers of images whose classes have the sizes of `long_tailed_sizes`; which class is
    in the head and which images of it are taken, `seed` draws.

    Args:
        labels: the class of each image, 0 to C-1.
        total: images of the subset.
    """
    rng = np.random.default_rng(seed)
    available = np.bincount(labels)
    order = rng.permutation(len(available))
    sizes = long_tailed_sizes(available[order], alpha, total)
    taken = [
        rng.permutation(np.nonzero(labels == label)[0])[:size]
        for label, size in zip(order, sizes, strict=True)
    ]
    return np.sort(np.concatenate(taken))


def long_tailed_sizes(available: np.ndarray, alpha: float, total: int | None = None) -> np.ndarray:
    """The sizes of classes that follow a Pareto distribution, as those of ImageNet-LT do
    (arXiv:1904.05160, where alpha is 6).

    The r-th of C classes has a share of (r/C)^(-1/alpha) - 1 of the first one's, which are the
    quantiles of numpy's `pareto(alpha)`. No class is smaller than SMALLEST, or than it was. The
    source tells alpha, 1280 and 5 images for the first and the last class, and 115,846 in all, but
    not how it drew them: of classes of 1280 this makes 117,540.

    Args:
        available: images of each class, in the order from head to tail, C.
        total: images of all of them; without it the first class is as large as the largest
            available, which makes 118,000 of ImageNet's.

    Raises:
        UserError: no such classes have `total` images.
    """
    classes = len(available)
    share = (np.arange(1, classes + 1) / classes) ** (-1 / alpha) - 1
    share = share / share[0] if classes > 1 else np.ones(1)

    def sizes(scale: float) -> np.ndarray:
        return np.minimum(np.maximum(np.round(scale * share).astype(int), SMALLEST), available)

    if total is None:
        return sizes(available.max())
    least, most = sizes(0).sum(), available.sum()
    if not least <= total <= most:
        raise UserError(
            f"--long-tailed {total}: {classes} classes, of which none loses more than all but "
            f"{SMALLEST} images, have {least} to {most}"
        )
    low, high = 0.0, 1.0  # of the scale
    while sizes(high).sum() < total:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sizes(middle).sum() >= total else (middle, high)
    found = sizes(high)
    # Classes that are rounded up at the same scale are too many by some, at most.
    grown = np.nonzero(found > sizes(low))[0]
    found[grown[: found.sum() - total]] -= 1
    return found
